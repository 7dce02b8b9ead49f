"""RegVar inside somebody else's training: one's own loop, or a trainer's."""

from estimators.integrations.hf_trainer import MeanAbsoluteTraining
from estimators.integrations.manual_training import TwoNetworks, mean_absolute_penalty

__all__ = ["MeanAbsoluteTraining", "TwoNetworks", "mean_absolute_penalty"]
