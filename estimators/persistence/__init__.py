"""Fits on disk: atomic files, states, checkpoints, and the checksums and option values that identify them."""
