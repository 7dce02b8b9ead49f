"""Typed errors. Each message says what was expected, what was received and what to try."""

from __future__ import annotations

from functools import partial
from typing import Self

__all__ = [
    "CalibrationNotSavedWarning",
    "ConvergenceError",
    "DataError",
    "DependentRowsError",
    "DerivativeRouteWarning",
    "DiagonalWeightsWarning",
    "EstimatorError",
    "IllConditionedError",
    "IndefiniteHessianError",
    "LambdaTooLargeError",
    "ModelChangedError",
    "ModelError",
    "NoLastLayerError",
    "NonDeterministicError",
    "NotConvergedWarning",
    "NotFittedError",
    "NotLogitsWarning",
    "OptionError",
    "RandomnessNotCheckedWarning",
    "ReferenceNotReachedError",
    "StateError",
    "TooLargeError",
    "TuningBoundaryWarning",
    "UncalibratedWarning",
    "UnsupportedError",
]


class EstimatorError(Exception):
    """Base of every error that this library raises on purpose."""

    def __init__(self, expected: str, *, received: str, remedy: str) -> None:
        self.expected, self.received, self.remedy = expected, received, remedy
        super().__init__(self._message())

    def _message(self) -> str:
        return f"Expected {self.expected}. Received {self.received}. Try: {self.remedy}"

    def at(self, location: str) -> Self:
        """Add a location such as "in batch 3" to the message, and return the error."""
        self.received = f"{self.received}, {location}"
        self.args = (self._message(),)
        return self

    def __reduce__(self) -> tuple[object, ...]:
        """Return how to construct the error again, so that it can be passed between processes."""
        return partial(type(self), self.expected, received=self.received, remedy=self.remedy), ()


class OptionError(EstimatorError, ValueError):
    """An argument of a constructor or method is out of its range or contradicts another."""


class DataError(EstimatorError, ValueError):
    """A loader, a batch, a target or a query does not fit the model and the likelihood."""


class NonDeterministicError(DataError):
    """Two passes over the loader did not give the same rows and outputs."""


class ModelError(EstimatorError, ValueError):
    """The network cannot be used as it is (mode, outputs, layers, non-finite weights)."""


class NoLastLayerError(ModelError):
    """The network does not end in a linear layer that is trained and its own."""


class DependentRowsError(ModelError):
    """The outputs of the network at a row depend on the other rows of its batch."""


class ModelChangedError(ModelError):
    """The network is no longer the one that was fitted."""


class NotFittedError(EstimatorError, RuntimeError):
    """A method that needs the result of ``fit`` was called before it."""


class StateError(EstimatorError, ValueError):
    """A saved state belongs to another estimator, other options, or other data, or is not one."""


class UnsupportedError(EstimatorError, NotImplementedError):
    """The combination is well-formed but has no answer here."""


class TooLargeError(EstimatorError, MemoryError):
    """The computation would not fit into memory; nothing has been allocated."""

    def __init__(self, what: str, *, bytes_needed: int, bytes_available: int, remedy: str) -> None:
        self.what, self.bytes_needed, self.bytes_available = what, bytes_needed, bytes_available
        super().__init__(
            f"{what} to fit into {bytes_available / 2**30:.2f} GiB of available memory",
            received=f"a need of {bytes_needed / 2**30:.2f} GiB",
            remedy=remedy,
        )

    def __reduce__(self) -> tuple[object, ...]:
        sizes = {"bytes_needed": self.bytes_needed, "bytes_available": self.bytes_available}
        return partial(type(self), self.what, **sizes, remedy=self.remedy), ()


class IndefiniteHessianError(EstimatorError, ArithmeticError):
    """The exact Hessian is singular or has a negative eigenvalue: no variance can be computed from it."""

    def __init__(self, *, smallest: float, largest: float) -> None:
        self.smallest, self.largest = smallest, largest
        kind = "an indefinite" if smallest < -1e-12 * abs(largest) else "a singular"
        super().__init__(
            "a positive definite Hessian at the trained weights",
            received=f"{kind} one: smallest eigenvalue {smallest:.3g}, largest {largest:.3g}",
            remedy="train longer, use a larger prior_precision, leave out weights with a symmetry (query and key "
            'projections of attention) by subset_of_weights, or use curvature="ggn", positive definite everywhere.',
        )

    def __reduce__(self) -> tuple[object, ...]:
        return partial(type(self), smallest=self.smallest, largest=self.largest), ()


class IllConditionedError(EstimatorError, ArithmeticError):
    """Products with A in the dtype of the network have too much round-off for a variance."""

    def __init__(self, *, condition: float, dtype: object) -> None:
        self.condition, self.dtype = condition, dtype
        super().__init__(
            f"a precision A whose condition number leaves digits to products in {dtype}",
            received=f"one of at least {condition:.2g}",
            remedy="standardise the inputs (and regression targets) to mean 0 and variance 1 and train on these, "
            "call model.double() on a device that has float64, or use a larger prior_precision.",
        )

    def __reduce__(self) -> tuple[object, ...]:
        return partial(type(self), condition=self.condition, dtype=self.dtype), ()


class ConvergenceError(EstimatorError, ArithmeticError):
    """An iterative solver stopped before its tolerance."""


class ReferenceNotReachedError(ConvergenceError):
    """The chains of a reference posterior did not converge within their budget, or not at the rows of a query."""


class DerivativeRouteWarning(UserWarning):
    """A fast derivative of the network disagrees with plain autograd, or fails; a slower route is used instead."""


class NotConvergedWarning(UserWarning):
    """A search, a training or posterior draws did not converge: the result may be wrong by more than its tolerance."""


class CalibrationNotSavedWarning(UserWarning):
    """A tuned fit was saved without its calibration: the file has no variance scale, temperature or noise factor."""


class DiagonalWeightsWarning(UserWarning):
    """A Kronecker structure treats the weights of some layers by the diagonal of their GGN alone."""


class NotLogitsWarning(UserWarning):
    """The outputs of the model look like probabilities, but the likelihood expects logits."""


class RandomnessNotCheckedWarning(UserWarning):
    """MC dropout could not check whether a network is random outside of its dropout layers, which would stay off."""


class TuningBoundaryWarning(UserWarning):
    """A tuned value is the last of its range: the optimum may lie beyond."""


class UncalibratedWarning(UserWarning):
    """A prediction is that of the plain posterior at the given prior precision, since `fit` had no validation rows."""


class LambdaTooLargeError(EstimatorError, ArithmeticError):
    """The refit at this λ left the region where the network responds linearly."""
