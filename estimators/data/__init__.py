"""Data: one batch, the training data as an iterable of batches, their checks, several processes."""

from estimators.data.batch import Batch, Loader
from estimators.data.training_data import AbsentTrainingData, TrainingData

__all__ = ["AbsentTrainingData", "Batch", "Loader", "TrainingData"]
