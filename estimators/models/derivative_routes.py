"""Which route to a derivative is used: the fastest that agrees with plain autograd on the user's own module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

from torch import Tensor

from estimators.errors import ModelError
from estimators.models.disagreement import Disagreement
from estimators.models.failures import FAILURES, is_final_error, short
from estimators.models.self_check import SelfCheck
from estimators.numerics.pytrees import PyTree, n_rows
from estimators.numerics.tracing import is_tracing

__all__ = ["BY_IDENTITY", "BY_NAME", "DerivativeRoutes", "plain_autograd"]

R = TypeVar("R")

BY_NAME, BY_IDENTITY = "by name", "by identity"
"""How parameters are swapped: the entries of a module by name, or every tensor that is one of the parameters."""


@dataclass
class DerivativeRoutes:
    """Which routes of a network are in use.

    Attributes:
        swap: how parameters are swapped, `BY_NAME` or `BY_IDENTITY`.
        first: the index of the first route to try, by what is computed; earlier routes have disagreed or failed.
        outputs_by_user_module: whether a copy of the module has other outputs than the module.
        copies_in_a_loop: whether vmap over displaced copies is wrong.
        writes_inputs: whether forwards write into their inputs, as decided after the first pass over the training
            rows; None before it, and inputs are then copied.
        input_write_seen: whether a forward of that pass has written into its inputs so far.
    """

    swap: str = BY_NAME
    first: dict[str, int] = field(default_factory=dict)
    outputs_by_user_module: bool = False
    copies_in_a_loop: bool = False
    writes_inputs: bool | None = None
    input_write_seen: bool = False

    def first_agreeing(
        self,
        check: SelfCheck,
        what: str,
        x: PyTree,
        routes: Sequence[tuple[str, Callable[[], R]]],
        difference: Callable[[R], Disagreement] | None,
        of_rows: Callable[[R, Tensor], Disagreement] | None = None,
    ) -> R:
        """Compute by the fastest route that agrees with plain autograd at x; a route that disagreed is not tried again.

        Args:
            check: compares, and keeps the report.
            what: the name of what is computed, for the report.
            x: inputs of B rows.
            routes: names and computations, from fast to slow; the last is plain autograd.
            difference: the error of a result against plain autograd; None if it need not be compared.
            of_rows: the same with the cotangents of each row times its weight (B,), 0 or 1, by which kinks are found.

        Returns:
            The result of the route.

        Raises:
            ModelError: plain autograd fails, or its gradient at a row alone differs from that among all rows.
        """
        if is_tracing():  # by the route of the fit, without a comparison
            return routes[self.first.get(what, 0)][1]()
        comparison = _Comparison(check, what, x, difference, of_rows)
        for i, (name, compute) in list(enumerate(routes[:-1]))[self.first.get(what, 0) :]:
            reason = ""
            for swap in (BY_NAME, BY_IDENTITY) if self.swap == BY_NAME else (BY_IDENTITY,):
                found = self._attempt(comparison, compute, swap)
                if not isinstance(found, _Rejected):
                    check.report.routes[what] = name
                    return found
                reason = reason or found.reason
            self.first[what] = i + 1
            check.report.record_fallback(what, name, reason, instead=routes[i + 1][0])
        name, compute = routes[-1]
        check.report.routes[what] = name
        return _by_plain_autograd(comparison, compute)

    def _attempt(self, comparison: _Comparison[R], compute: Callable[[], R], swap: str) -> R | _Rejected:
        """The result of a route with parameters swapped in one way, or why it is rejected."""
        before, self.swap = self.swap, swap
        try:
            result = compute()
            found, state = comparison.measure(result)
        except FAILURES as error:
            self.swap = before
            if is_final_error(error):
                raise
            return _Rejected(f"fails ({short(error)})")
        if not comparison.agrees(result, found, state):
            self.swap = before
            return _Rejected(str(found))
        comparison.record(found)
        if swap != before:
            comparison.check.report.record_fallback(
                "weights",
                "functional_call on a copy of the module",
                "misses uses of them (a closure, a hook, a list, or a forward replaced on the instance)",
                instead="every use is replaced by the identity of the parameter",
            )
        return result


@contextmanager
def plain_autograd() -> Iterator[None]:
    """Raise ModelError where torch.autograd.grad cannot differentiate the network."""
    try:
        yield
    except FAILURES as error:
        if is_final_error(error):
            raise
        raise ModelError(
            "a network that torch.autograd.grad can differentiate",
            received=f"one for which it says: {short(error)}",
            remedy="use_reentrant=False in torch.utils.checkpoint, and no operation without a derivative.",
        ) from error


def _by_plain_autograd(comparison: _Comparison[R], compute: Callable[[], R]) -> R:
    """The result of plain autograd; compared too, since rows one at a time may differ from all rows together."""
    with plain_autograd():
        result = compute()
        found, state = comparison.measure(result)
    if not comparison.agrees(result, found, state, needs_other_rows=False):
        raise ModelError(
            "a network whose gradient at a row does not depend on the other rows",
            received=f"one whose gradient of a row alone {found}",
            remedy="leave out scale_grad_by_freq=True and statistics of the batch.",
        )
    comparison.record(found)
    return result


@dataclass(frozen=True)
class _Comparison(Generic[R]):
    """How results of the routes are compared with plain autograd; `first_agreeing` has the arguments."""

    check: SelfCheck
    what: str
    x: PyTree
    difference: Callable[[R], Disagreement] | None
    of_rows: Callable[[R, Tensor], Disagreement] | None

    def measure(self, result: R) -> tuple[Disagreement | None, Tensor]:
        """The error of a result, None if it need not be compared, and the random state before the comparison."""
        state = self.check.random_state()
        return None if self.difference is None else self.difference(result), state

    def agrees(self, result: R, found: Disagreement | None, state: Tensor, *, needs_other_rows: bool = True) -> bool:
        """Whether the error of a result is round-off, or that of rows with kinks."""
        if found is None:
            return True
        if self.of_rows is None:
            return found.within(self.check.tolerance())
        what = self.what if needs_other_rows else None
        return self.check.agrees(found, what, self.x, partial(self.of_rows, result), state)

    def record(self, found: Disagreement | None) -> None:
        """Record that a result agrees, if it was compared."""
        if found is not None:
            self.check.report.record_agreement(self.what, n_rows(self.x), found.error)


@dataclass(frozen=True)
class _Rejected:
    """Why a route is not used."""

    reason: str
