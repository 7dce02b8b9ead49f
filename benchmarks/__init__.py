"""Benchmarks of time, memory and quality: comparison with laplace-torch, RegVar alone, and large networks."""
