"""Comparison with laplace-torch, one file per group of rows."""
