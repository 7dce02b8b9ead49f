"""Counter of the rows that pass through the network during a fit, by phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from torch import nn

from estimators.numerics.pytrees import PyTree, n_rows
from estimators.numerics.tracing import is_tracing

__all__ = ["SELF_CHECK", "PassCounter", "RowCounts"]

P = ParamSpec("P")
T = TypeVar("T")

SELF_CHECK = "self-check"
"""Phase of comparisons with plain autograd."""
CHECKS = "checks"
"""Phase before the first named one: data and network are checked."""
FORWARD, TANGENT, BACKWARD = 1 / 3, 1 / 3, 2 / 3
"""Cost of a row in each direction: a forward and a backward together cost 1."""


@dataclass
class RowCounts:
    """Numbers of rows by direction: forward, forward mode (one tangent each), backward (one cotangent each)."""

    forward: float = 0.0
    tangent: float = 0.0
    backward: float = 0.0

    @property
    def cost(self) -> float:
        """Cost in rows through forward and backward: forward 1/3, tangent 1/3, backward 2/3."""
        return FORWARD * self.forward + TANGENT * self.tangent + BACKWARD * self.backward


class PassCounter:
    """Counter of the rows that pass through a network, by phase of the fit.

    The unit is a pass: forward and backward over N rows. A gradient is one pass, a product with A one pass per vector
    (a tangent and a backward), and a forward a third. What is computed once for all vectors is counted once.

    `Network` counts every forward. Code that differentiates or vectorises a forward multiplies the count by
    `transformed`.
    """

    def __init__(self) -> None:
        self.phases: dict[str, RowCounts] = {}
        self._name = CHECKS

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what is computed inside under the phase `name`; the innermost phase counts."""
        outer, self._name = self._name, name
        try:
            yield
        finally:
            self._name = outer

    def forward(self, rows: int) -> None:
        """Count a forward of `rows`."""
        self._rows().forward += rows

    def backward(self, rows: int) -> None:
        """Count a backward of `rows`."""
        self._rows().backward += rows

    def move(self, phase: str, *, tangent: float = 0, backward: float = 0) -> None:
        """Move rows that have been counted in this phase to another one.

        Used if one vectorised call serves two phases: it is counted here as a whole, and then the part of the other
        phase is moved.

        Args:
            phase: the phase that they are for.
            tangent: rows in forward mode, times vectors.
            backward: rows of backward passes, times cotangents.
        """
        for rows, sign in ((self._rows(), -1), (self.phases.setdefault(phase, RowCounts()), 1)):
            rows.tangent += sign * tangent
            rows.backward += sign * backward

    @contextmanager
    def calls_of(self, module: nn.Module) -> Iterator[None]:
        """Count the plain forwards of a module. Copies made of it inside the context count too: they keep the hook."""

        def enter(_module: nn.Module, args: tuple[PyTree, ...], keywords: dict[str, PyTree]) -> None:
            self.forward(n_rows((args, keywords)))

        hook = module.register_forward_pre_hook(enter, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def transformed(
        self, *, forward: float | None = None, tangent: float = 0, backward: float = 0, backward_per_call: float = 0
    ) -> Iterator[Callable[[Callable[P, T]], Callable[P, T]]]:
        """Replace the forwards counted inside by what a vectorised or differentiated call computes.

        vmap calls a function once for k vectors, and a loop calls it k times; both must count the same. The context
        yields a wrapper that counts the calls of a function. The rows of one call, times the arguments, are what is
        counted. For example, `transformed(forward=1, tangent=k)` around k Jacobian-vector products counts one forward
        and k tangents of the rows, by vmap or in a loop.

        Args:
            forward: forwards, in calls; None keeps those that were counted, 1 if no function was wrapped.
            tangent: forward-mode tangents, in calls.
            backward: backward passes, in calls.
            backward_per_call: backward passes for each call that was made, in addition to `backward`.
        """
        rows = self._rows()
        before, calls = rows.forward, 0

        def counted(function: Callable[P, T]) -> Callable[P, T]:
            def call(*arguments: P.args, **keywords: P.kwargs) -> T:
                nonlocal calls
                calls += 1
                return function(*arguments, **keywords)

            return call

        yield counted
        calls = max(calls, 1)
        a_call = (rows.forward - before) / calls
        rows.forward = before + (calls if forward is None else forward) * a_call
        rows.tangent += tangent * a_call
        rows.backward += (backward + backward_per_call * calls) * a_call

    @property
    def cost(self) -> float:
        """Cost of all phases, in rows through forward and backward."""
        return sum(rows.cost for rows in self.phases.values())

    def cost_except(self, phase: str) -> float:
        """Return the cost of all phases but one."""
        return sum(rows.cost for name, rows in self.phases.items() if name != phase)

    def passes(self, n_data: int, n_copies: int) -> dict[str, float]:
        """Return the passes over N rows, divided by the number of perturbed copies that share them, by phase."""
        return {name: rows.cost / n_data / n_copies for name, rows in self.phases.items()}

    def _rows(self) -> RowCounts:
        # While an exported module is traced nothing is computed, and nothing is counted.
        return RowCounts() if is_tracing() else self.phases.setdefault(self._name, RowCounts())
