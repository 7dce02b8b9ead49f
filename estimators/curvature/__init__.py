"""Representations of the posterior precision A, one a file: each can solve with it and read variances from it."""
