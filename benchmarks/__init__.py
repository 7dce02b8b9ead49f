"""Benchmarks: beside laplace-torch, of RegVar by itself, and on large networks; one page of docs/benchmarks each."""
