"""A problem: a network, its likelihood and its data, and how they are checked and read."""

from bdl_bench.problem.problem import Problem
from bdl_bench.problem.queries import Loader

__all__ = ["Loader", "Problem"]
