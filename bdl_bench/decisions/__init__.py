"""Loops of trainings in which a method decides with its variance, or in which the training set is changed."""

from bdl_bench.decisions.learner import Learner, Networks
from bdl_bench.decisions.run import Outcome, run_decision

__all__ = ["Learner", "Networks", "Outcome", "run_decision"]
