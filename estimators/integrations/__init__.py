"""RegVar inside somebody else's training: one's own loop, or a trainer's."""

from estimators.integrations.hf_trainer import MeanAbsoluteTraining
from estimators.integrations.manual_training import RegularizedPair, mean_absolute_penalty

__all__ = ["MeanAbsoluteTraining", "RegularizedPair", "mean_absolute_penalty"]
