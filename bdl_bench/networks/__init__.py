"""Architectures of the tasks and benchmarks, one family per file."""
