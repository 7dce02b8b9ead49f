"""Numerics without models: pytrees of rows, vectorization, reductions in float64, dtypes, symmetric products."""
