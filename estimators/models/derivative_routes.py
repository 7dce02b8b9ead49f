"""Which way to a derivative is used: the fastest that agrees with plain autograd on the user's own module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from estimators.errors import EstimatorError, ModelError
from estimators.models.self_check import Disagreement, SelfCheck
from estimators.numerics.pytrees import PyTree, n_rows

__all__ = ["BY_IDENTITY", "BY_NAME", "FAILURES", "DerivativeRoutes", "is_ours", "short"]

R = TypeVar("R")

BY_NAME, BY_IDENTITY = "by name", "by identity"
"""How parameters are exchanged: the entries of a module, or every tensor that is one of them."""
FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError, AssertionError)
"""What a route raises that the network does not allow; errors of this library among them are raised further."""


@dataclass
class DerivativeRoutes:
    """Which routes of a network are in use.

    Attributes:
        swap: how parameters are exchanged, `BY_NAME` or `BY_IDENTITY`.
        first: the number of the first route to try, by what is computed; those before have been given up.
        outputs_by_own_module: whether a copy of the module gives other outputs than the module.
        copies_in_a_loop: whether vmap over displaced copies is wrong.
        writes_inputs: whether a forward writes into its inputs; None: not known yet.
        written: whether one has been seen to.
    """

    swap: str = BY_NAME
    first: dict[str, int] = field(default_factory=dict)
    outputs_by_own_module: bool = False
    copies_in_a_loop: bool = False
    writes_inputs: bool | None = None
    written: bool = False

    def first_agreeing(
        self,
        check: SelfCheck,
        what: str,
        x: PyTree,
        routes: Sequence[tuple[str, Callable[[], R]]],
        difference: Callable[[R], Disagreement] | None,
        *,
        last_is_plain: bool = True,
    ) -> R:
        """What the fastest route gives that agrees with plain autograd at x; routes given up are not tried again.

        Args:
            check: compares, and keeps the report.
            what: the name of what is computed, in the report.
            x: inputs of B rows.
            routes: names and computations, from fast to slow; the last is plain autograd, or checks by itself.
            difference: how far a result is from plain autograd; None where it need not be compared.
            last_is_plain: whether the last route is plain autograd, a row at a time or all together.

        Raises:
            ModelError: plain autograd fails, or gives other slopes for a row alone than for all rows together.
        """
        for i, (name, compute) in list(enumerate(routes[:-1]))[self.first.get(what, 0) :]:
            reason = ""
            for swap in self.swaps():
                found = self._attempt(check, what, x, compute, difference, swap)
                if not isinstance(found, _GivenUp):
                    check.report.routes[what] = name
                    return found
                reason = reason or found.reason
            self.first[what] = i + 1
            check.give_up(what, name, reason, instead=routes[i + 1][0])
        name, compute = routes[-1]
        check.report.routes[what] = name
        return _by_plain_autograd(check, what, x, compute, difference) if last_is_plain else compute()

    def _attempt(
        self,
        check: SelfCheck,
        what: str,
        x: PyTree,
        compute: Callable[[], R],
        difference: Callable[[R], Disagreement] | None,
        swap: str,
    ) -> R | _GivenUp:
        """The result of a route with parameters exchanged in one way, or why it is not used."""
        before, self.swap = self.swap, swap
        try:
            result = compute()
            apart = None if difference is None else difference(result)
        except FAILURES as error:
            self.swap = before
            if is_ours(error):
                raise
            return _GivenUp(f"fails ({short(error)})")
        if apart is not None and not apart.within(check.tolerance()):
            self.swap = before
            return _GivenUp(str(apart))
        if apart is not None:
            check.seen(what, n_rows(x), apart.error)
        if swap != before:
            check.give_up(
                "weights",
                "functional_call on a copy of the module",
                "misses uses of them (a closure, a hook, a list, or a forward replaced on the instance)",
                instead="every use is exchanged by the identity of the parameter",
            )
        return result

    def swaps(self) -> tuple[str, ...]:
        """Ways to exchange parameters that may be tried."""
        return (BY_NAME, BY_IDENTITY) if self.swap == BY_NAME else (BY_IDENTITY,)


def _by_plain_autograd(
    check: SelfCheck, what: str, x: PyTree, compute: Callable[[], R], difference: Callable[[R], Disagreement] | None
) -> R:
    try:
        result = compute()
        apart = None if difference is None else difference(result)
    except FAILURES as error:
        if is_ours(error):
            raise
        raise ModelError(
            "a network that torch.autograd.grad can differentiate",
            received=f"one for which it says: {short(error)}",
            remedy="use_reentrant=False in torch.utils.checkpoint, and no operation without a derivative.",
        ) from error
    if apart is not None and not apart.within(check.tolerance()):
        raise ModelError(
            "a network whose gradient at a row does not depend on the other rows",
            received=f"one whose gradient of a row alone {apart}",
            remedy="leave out scale_grad_by_freq=True and statistics of the batch.",
        )
    if apart is not None:
        check.seen(what, n_rows(x), apart.error)
    return result


@dataclass(frozen=True)
class _GivenUp:
    """Why a route is not used."""

    reason: str


def is_ours(error: BaseException) -> bool:
    """Whether an error is one of this library, or about memory: no other route would do."""
    return isinstance(error, (EstimatorError, torch.OutOfMemoryError))


def short(error: BaseException) -> str:
    """The first sentence of an error of torch."""
    return str(error).strip().split("\n")[0].split(". ")[0][:160] or type(error).__name__
