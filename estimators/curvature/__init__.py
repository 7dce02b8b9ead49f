"""Representations of the posterior precision A, one per file, with solves and variances."""
