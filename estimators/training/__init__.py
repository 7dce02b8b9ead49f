"""Gradient descent: the recipe, the training loop, the training of a network to its MAP, and its convergence."""

from estimators.training.converge import ConvergenceReport, converge_map
from estimators.training.recipe import Recipe
from estimators.training.training import fit_weights, train_map

__all__ = ["ConvergenceReport", "Recipe", "converge_map", "fit_weights", "train_map"]
