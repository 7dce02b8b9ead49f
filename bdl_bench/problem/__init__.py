"""A problem: a network, its likelihood and its data, and how they are checked and read."""

from bdl_bench.problem.decision import ActiveLearning, BayesianOptimisation, Interventions
from bdl_bench.problem.problem import Problem
from bdl_bench.problem.queries import Loader

__all__ = ["ActiveLearning", "BayesianOptimisation", "Interventions", "Loader", "Problem"]
