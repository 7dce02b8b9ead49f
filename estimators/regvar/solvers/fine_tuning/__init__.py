"""FineTune: refits of all samples together by minibatches or conjugate gradients."""

from estimators.regvar.solvers.fine_tuning.fine_tune import FineTune

__all__ = ["FineTune"]
