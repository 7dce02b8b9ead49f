"""The objective L(θ): a data term and a prior over the training data, and products with its curvature A."""

from estimators.objective.objective import Labels, Objective, Prior, SelfTargets

__all__ = ["Labels", "Objective", "Prior", "SelfTargets"]
