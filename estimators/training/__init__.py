"""Gradient descent: the recipe, the training loop, and the training of a network to its MAP."""

from estimators.training.recipe import Recipe
from estimators.training.training import fit_weights, train_map

__all__ = ["Recipe", "fit_weights", "train_map"]
