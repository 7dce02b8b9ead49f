"""Methods to compare with, one a file."""

from estimators.baselines.laplace_torch import LaplaceTorch
from estimators.baselines.map import MAP

__all__ = ["MAP", "LaplaceTorch"]
