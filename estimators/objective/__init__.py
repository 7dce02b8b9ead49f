"""The objective L(θ): a data term and a prior over the training data, and products with its curvature A."""

from estimators.objective.objective import LabelLoss, Objective, Prior, SelfTargetLoss

__all__ = ["LabelLoss", "Objective", "Prior", "SelfTargetLoss"]
