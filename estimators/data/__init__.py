"""Data: one batch, the training data as an iterable of batches, their checks, several processes."""

from estimators.data.batch import Batch, Loader
from estimators.data.training_data import AbsentBatches, Batches

__all__ = ["AbsentBatches", "Batch", "Batches", "Loader"]
