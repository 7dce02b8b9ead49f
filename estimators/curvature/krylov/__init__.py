"""The posterior precision by products alone: conjugate gradients, Lanczos, low rank."""
