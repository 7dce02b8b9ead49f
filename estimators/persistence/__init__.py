"""Fits on disk: whole files, states, checkpoints, and the checksums and option values they are compared by."""
