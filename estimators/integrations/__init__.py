"""RegVar in another training: in your own loop, or in `transformers.Trainer`."""

from estimators.integrations.hf_trainer import MeanAbsoluteTraining
from estimators.integrations.manual_training import RegularizedPair, mean_absolute_penalty

__all__ = ["MeanAbsoluteTraining", "RegularizedPair", "mean_absolute_penalty"]
