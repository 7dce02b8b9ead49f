"""Every derivative that a fit uses is compared with plain autograd on the user's own module, on every batch.

Four statements cover all routes, for random weights u of the outputs and a random direction r of the parameters:

    Jᵀu    by backward passes, rows of J, factors of layers, features of a last layer      against g
    ⟨u, J r⟩    by forward mode                                                            against ⟨g, r⟩
    ⟨u, f(θ̂ + εr) − f(θ̂ − εr)⟩ / 2ε    of the function whose weights can be displaced     against ⟨g, r⟩
    f    of a row alone                                                                    against f among others

g = `torch.autograd.grad`(⟨u, f⟩) on the module itself. A route that disagrees is given up for the next slower one; what
cannot be answered (rows that depend on each other, no slope at all, weights that cannot be displaced) raises.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import grad
from torch.utils import _pytree as pytree

from estimators.errors import DependentRowsError, DerivativeRouteWarning, ModelError
from estimators.models.known_gradients import KnownGradients
from estimators.models.own_module import OwnModule
from estimators.models.subsets import Subset
from estimators.numerics.pytrees import PyTree, Shared, n_rows, select_rows
from estimators.runtime.pass_counter import SELF_CHECK, PassCounter

__all__ = ["DerivativeReport", "Disagreement", "SelfCheck"]

TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
"""Largest relative error of a route: round-off of the dtype with room to spare; wrong routes were off by .01 to 270."""
SECOND_DERIVATIVES = 100.0
"""Round-off of second derivatives in units of that of first ones: of saturated classes Λ = p − p² is a difference of
nearly equal numbers. Seen at a polished optimum: 1.3e-6."""
OUTPUTS, DISPLACED = "outputs", "displaced weights"
"""Comparisons without a slope."""
_STEPS = {torch.float64: (1e-6, 1e-5, 1e-4)}
_DISPLACED = {torch.float64: 1e-3}  # elsewhere .2: a difference of two float32 outputs
_UNDERFLOW = 1e-30
"""A slope that a narrower dtype may have as 0."""
_ROWS_ALONE = 3
"""Rows of each batch that are computed alone: a branch on the mean of a batch shows at every other row."""
_ABSOLUTE = 1e-2
"""Part of the norm of the whole slope that is added to that of a parameter, below which its error is round-off."""


@dataclass
class DerivativeReport:
    """What was checked against plain autograd, and what was chosen because of it.

    Attributes:
        rows: rows compared, by what was computed ("rows of J", "J v", ...).
        largest_error: largest relative error of what was used, by the same names.
        routes: the route in use, by the same names.
        disagreements: one sentence for each route that was given up.
    """

    rows: dict[str, int] = field(default_factory=dict)
    largest_error: dict[str, float] = field(default_factory=dict)
    routes: dict[str, str] = field(default_factory=dict)
    disagreements: list[str] = field(default_factory=list)


class SelfCheck:
    """Comparisons with `own`: of every training row once, and of every query.

    Args:
        own: the user's module, differentiated by plain autograd.
        subset: the chosen parameters.
        pass_counter: counts the rows that go through `own`.
        stored: the user's module where `own` is a copy of it in another dtype: of fewer digits, and no copy.
    """

    def __init__(
        self, own: OwnModule, subset: Subset, pass_counter: PassCounter, stored: OwnModule | None = None
    ) -> None:
        self.own, self.subset, self.stored = own, subset, stored
        self.own.pass_counter = pass_counter
        self.report = DerivativeReport()
        self.n_data, self.fitting = 0, False
        self.slope_seen = self._slope_wanted = False
        self._kinds: dict[str, set[object]] = {}
        self._generator = torch.Generator().manual_seed(0)
        self._known = KnownGradients()
        self.enabled = True

    def counted_by(self, pass_counter: PassCounter) -> SelfCheck:
        """A check of the same network, whose rows are counted by another ledger."""
        other = copy.copy(self)
        other.own = copy.copy(self.own)
        other.own.pass_counter = pass_counter
        return other

    def counted(self) -> AbstractContextManager[None]:
        """Within it, rows are counted as those of the self-check."""
        return self.own.pass_counter.phase(SELF_CHECK)

    @contextmanager
    def on_training_rows(self) -> Iterator[None]:
        """Within it, x are training rows: each is compared once, whatever its kind."""
        before, self.fitting = self.fitting, True
        try:
            yield
        finally:
            self.fitting = before

    def for_function(self) -> SelfCheck:
        """A check of a function of these outputs: the same module and report, every kind of query new."""
        other = copy.copy(self)
        other._kinds = {}
        return other

    # ---------------------------------------------------------------- when

    def is_new(self, what: str, x: PyTree, *more: object) -> bool:
        """Whether x is of a kind that `what` has not been computed at."""
        kinds, kind = self._kinds.setdefault(what, set()), (_kind(x), more)
        is_new = kind not in kinds
        kinds.add(kind)
        return is_new and self.enabled

    def due(self, what: str, x: PyTree, *more: object) -> bool:
        """Whether `what` is to be compared at x: at every training row once, and at every query.

        Queries of one kind may differ in their values: one row alone may take another branch of forward.
        """
        if not self.enabled or not n_rows(x):
            return False
        is_new = self.is_new(what, x, *more)
        return is_new or not self.fitting or self.report.rows.get(what, 0) < self.n_data

    def seen(self, what: str, rows: int, error: float) -> None:
        """Enter a comparison that held."""
        self.report.rows[what] = self.report.rows.get(what, 0) + rows
        self.report.largest_error[what] = max(error, self.report.largest_error.get(what, 0.0))

    # ---------------------------------------------------------------- what is compared

    def random(self, like: Tensor) -> Tensor:
        """Standard normal numbers of the shape, dtype and device of `like`, from a generator of its own."""
        return torch.randn(like.shape, generator=self._generator, dtype=torch.float64).to(like)

    def cotangent(self, x: PyTree, like: Tensor) -> Tensor:
        """A cotangent u of the shape of `like` (B, ..., C): that of an earlier comparison at these rows, or random.

        Its gradient is known then, so that another kind of product costs no further pass over the training rows.
        """
        known = self._known.cotangent(x) if self.fitting else None
        if known is None or known.numel() != like.numel() or not bool(known.any()):
            return self.random(like)
        return known.reshape(like.shape).to(like)

    def forget_gradients(self) -> None:
        """Release what `cotangent` needs: the training rows have been compared."""
        self._known = KnownGradients()

    def _gradient(self, x: PyTree, u: Tensor, names: Sequence[str] | None = None) -> Tensor:
        """Jᵀu (P,) by plain autograd for u (B, C), or its entries of the parameters `names`: computed, or known."""
        known = self._known.gradient(x, u) if self.fitting else None
        if known is not None:
            return known if names is None else torch.cat([known[self.subset.slices[name]] for name in names])
        with self.counted():
            g = self.own.vjp(x, u[None], names)[0]
        if self.fitting and names is None:
            self._known.keep(x, u, g)
        return g

    def slope_error(self, x: PyTree, u: Tensor, product: Tensor, names: Sequence[str] | None = None) -> Disagreement:
        """How far `product` (P,) is from Jᵀu by plain autograd, for u (B, C)."""
        g = self._gradient(x, u, names)
        self._check_finite(g)
        self._see_slope(u, g)
        entries = self.subset.entries
        entries = entries if names is None else {name: entries[name] for name in names}
        found = _worst(entries, product, g)
        if self.stored is None or not found.within(self.tolerance()):
            return found
        stored = self.stored.vjp(x, u[None], names)[0]
        if not bool(stored.any()) and float(product.abs().max()) < _UNDERFLOW:
            return found
        rough = _worst(entries, product, stored)
        return found if rough.within(TOLERANCE.get(self.stored.coarsest_dtype, 0.1)) else rough

    def along_error(
        self, x: PyTree, cotangent: Tensor, along: Tensor, r: Tensor, *, u: Tensor | None = None
    ) -> Disagreement:
        """How far ⟨u, along⟩ of along = J r (B, C) is from ⟨g, r⟩, r (P,), in units of the norm of its terms.

        g = Jᵀu by plain autograd; of a function of the outputs `cotangent` is Gᵀu, else u itself.
        """
        u = cotangent if u is None else u
        g = self._gradient(x, cotangent)
        self._check_finite(g)
        self._see_slope(cotangent, g)
        found = _along(u, along, g, r)
        if self.stored is None or not found.within(self.tolerance()):
            return found
        rough = _along(u, along, self.stored.vjp(x, cotangent[None])[0], r)
        return found if rough.within(TOLERANCE.get(self.stored.coarsest_dtype, 0.1)) else rough

    def compare_curved(self, product: Tensor, expected: Tensor) -> Disagreement:
        """How far H v (P,) is from that by plain autograd, in units of the round-off of second derivatives."""
        self._see_slope(expected, expected)
        found = _worst(self.subset.entries, product, expected)
        return Disagreement(found.error / SECOND_DERIVATIVES, found.name)

    def tolerance(self) -> float:
        """Largest relative error of a route that is in use."""
        return TOLERANCE.get(self.own.dtype, 0.1)

    # ---------------------------------------------------------------- what raises

    def check_rows_alone(self, x: PyTree, f: Tensor, *, what: str) -> None:
        """DependentRowsError where a row's outputs depend on the other rows of x; f (B, ...) are those of all rows."""
        error = self.row_alone_error(x, f)
        if not error <= self.tolerance():
            raise _coupled(what, f"outputs of a row alone that differ by {error:.2g} of the largest output")

    def row_alone_error(self, x: PyTree, f: Tensor) -> float:
        """How far the module's outputs at some of the rows are from those in f (B, ...), relative to the largest.

        Some rows alone, and a random quarter of the rows together: rows may depend on each other for some values only.
        A module that takes no single row is given the quarter; 0 if it does not take this either.
        """
        rows = torch.randperm(len(f), generator=self._generator).to(f.device)
        parts = [*rows[:_ROWS_ALONE].split(1), rows[: len(f) // 4]]
        return max((self._part_error(x, f, part.sort().values) for part in parts if len(part)), default=0.0)

    def _part_error(self, x: PyTree, f: Tensor, pick: Tensor) -> float:
        try:
            alone = self.own.outputs(select_rows(x, pick))
        except (RuntimeError, IndexError):
            return 0.0
        except ValueError as error:
            if "more than 1 value" in str(error):  # batch statistics of one value
                raise _coupled("row", "batch normalisation over the rows of a batch") from error
            return 0.0
        return _ratio(_apart(alone, f[pick]), float(f.abs().double().max()) if f.numel() else 0.0)

    def check_displaced(self, x: PyTree, function: Callable[[Tensor], Tensor], theta: Tensor) -> None:
        """ModelError where f(θ, x) of displaced weights does not move along the slope of the user's module."""
        with torch.no_grad():
            f = function(theta)
        u = self.random(f)
        g = self.own.vjp(x, u[None])[0]
        by_function = grad(lambda theta: (u * function(theta)).sum())(theta)
        apart = _worst(self.subset.entries, by_function.detach(), g)
        r = self.random(theta) * theta.abs().mean().clamp_min(1e-3)
        terms = g.double() * r.double()
        expected, scale = float(terms.sum()), float(terms.norm())
        errors = []
        for step in _STEPS.get(theta.dtype, (1e-3, 1e-2)):
            with torch.no_grad():
                moved = function(theta + step * r).double() - function(theta - step * r).double()
            errors.append(_ratio(abs(float((u.double() * moved).sum()) / (2 * step) - expected), scale))
        if not apart.within(self.tolerance()):
            raise _not_displaceable(f"a gradient of displaced weights that {apart}")
        if min(errors) > _DISPLACED.get(theta.dtype, 0.2):
            raise _not_displaceable(f"outputs that differ from it by {min(errors):.2g}")

    def check_slope(self) -> None:
        """ModelError where slopes were compared, and no gradient has reached any chosen parameter."""
        if self.enabled and self._slope_wanted and not self.slope_seen:
            raise ModelError(
                "outputs with a gradient with respect to the chosen parameters",
                received="a gradient of exactly 0 at every row (outputs detached, or computed under torch.no_grad())",
                remedy="remove .detach(), .data, .item() or torch.no_grad() from forward, or choose the parameters "
                "that the outputs depend on by subset_of_weights.",
            )

    def _see_slope(self, u: Tensor, g: Tensor) -> None:
        """Enter whether a gradient g arrives for a cotangent u that is not 0; at a query it has to."""
        self.slope_seen = self.slope_seen or bool(g.any())
        self._slope_wanted = self._slope_wanted or bool(u.any())
        if not self.fitting:
            self.check_slope()

    def _check_finite(self, g: Tensor) -> None:
        if not bool(torch.isfinite(g).all()):
            names = [name for name, place in self.subset.slices.items() if len(g) == self.subset.n_parameters
                     and not bool(torch.isfinite(g[place]).all())]  # fmt: skip
            listed = ", ".join(names[:3]) or "the last layer"
            raise ModelError(
                "finite gradients of the outputs",
                received=f"NaN or Inf in the gradient of {listed}",
                remedy="look for sqrt, norm, log or a division at 0 in forward, and add a small constant inside it.",
            )

    # ---------------------------------------------------------------- what is given up

    def give_up(self, what: str, route: str, reason: str, *, instead: str) -> None:
        """Enter that a route is not used any more, and warn."""
        sentence = f"{what}: {route} {reason}; {instead} instead"
        self.report.disagreements.append(sentence)
        warnings.warn(
            f"A fast derivative of this network was not used. {sentence}. The results are those of plain autograd.",
            DerivativeRouteWarning,
            stacklevel=2,
        )


@dataclass(frozen=True)
class Disagreement:
    """A relative error, and the parameter in which it is largest."""

    error: float
    name: str | None

    def within(self, tolerance: float) -> bool:
        """Whether it is round-off; NaN is not."""
        return self.error <= tolerance

    def __str__(self) -> str:
        place = "" if self.name is None else f", most in {self.name!r}"
        return f"differs from plain autograd by {100 * self.error:.2g} %{place}"


def _worst(entries: dict[str, int], product: Tensor, g: Tensor) -> Disagreement:
    """The parameter with the largest error, relative to its slope and a part of the whole one's; entries of θ each."""
    sizes = list(entries.values())
    whole = g.double().norm()
    parts = zip(entries, product.double().split(sizes), g.double().split(sizes), strict=True)
    errors = [
        (_ratio(float((got - expected).norm()), float(expected.norm() + _ABSOLUTE * whole)), name)
        for name, got, expected in parts
    ]
    error, name = max(errors, key=lambda pair: pair[0] if pair[0] == pair[0] else float("inf"))
    return Disagreement(error, name)


def _along(u: Tensor, along: Tensor, g: Tensor, r: Tensor) -> Disagreement:
    """⟨u, J r⟩ against ⟨g, r⟩, in units of the norm of the terms of the latter."""
    terms = g.double() * r.double()
    wrong = float((u.double() * along.double()).sum() - terms.sum())
    return Disagreement(_ratio(abs(wrong), float(terms.norm())), None)


def _apart(alone: Tensor, expected: Tensor) -> float:
    """The largest difference; infinite between shapes."""
    if alone.shape != expected.shape:
        return float("inf")
    return float((alone.double() - expected.double()).abs().max()) if alone.numel() else 0.0


def _ratio(error: float, scale: float) -> float:
    """error/scale; 0 where both are 0."""
    if error == 0:
        return 0.0
    return error / scale if scale > 0 else float("inf")


def _kind(x: PyTree) -> object:
    """What two queries have in common if they are computed alike: structure, shapes, dtypes, and values of flags."""
    leaves, structure = pytree.tree_flatten(x)
    return str(structure), tuple(_kind_of_leaf(leaf) for leaf in leaves)


def _kind_of_leaf(leaf: object) -> object:
    if isinstance(leaf, Shared):
        return "shared", _kind_of_leaf(leaf.value)
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    flags = (bool(leaf.any()), bool(leaf.all())) if leaf.dtype == torch.bool else None
    return tuple(leaf.shape), leaf.dtype, flags


def _not_displaceable(received: str) -> ModelError:
    return ModelError(
        "weights that can be displaced: outputs that move along the gradient of the network",
        received=f"{received} (a weight inside torch.no_grad(), a padding row of an embedding, a gradient hook, or a "
        "weight of a compiled or scripted part)",
        remedy="solver=LinearResponse(), which displaces no weight; or freeze weights without a gradient by "
        "requires_grad_(False), and register every module as a submodule.",
    )


def _coupled(what: str, received: str) -> DependentRowsError:
    return DependentRowsError(
        f"a network whose outputs at a {what} do not depend on the other rows",
        received=received,
        remedy="use running statistics in batch normalisation (track_running_stats=True), batch_first=True in encoders "
        "that are given (B, T, C), and no mean or softmax over dimension 0.",
    )
