"""Costs of RegVar: a training step, inference, memory, and their growth with the problem size."""
