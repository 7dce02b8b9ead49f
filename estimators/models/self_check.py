"""The self-check: every derivative that a fit uses is compared with plain autograd on the user's own module.

Four statements cover all routes, for random weights u of the outputs and a random direction r of the parameters:

    Jᵀu    by backward passes, rows of J, factors of layers, features of a last layer      against g
    ⟨u, J r⟩    by forward mode                                                            against ⟨g, r⟩
    ⟨u, f(θ̂ + εr) − f(θ̂ − εr)⟩ / 2ε    of the function whose weights can be displaced     against ⟨g, r⟩
    f    of a row alone                                                                    against f among others

g = `torch.autograd.grad`(⟨u, f⟩) on the module itself. A route that disagrees is replaced by the next slower one. An
error is raised if no route can be right: rows that depend on each other, no gradient at all, weights that cannot be
displaced. `function_checks` has the last two statements.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from estimators.errors import DerivativeRouteWarning, ModelError
from estimators.models.disagreement import Disagreement, error_along_direction, largest_parameter_error
from estimators.models.input_kinds import InputKinds
from estimators.models.kinks import ErrorOfRows, RoundOff, disagreeing_rows, kink_explains
from estimators.models.known_gradients import KnownGradients
from estimators.models.subsets import Subset
from estimators.models.user_module import UserModule
from estimators.numerics.pytrees import PyTree, n_rows, select_rows
from estimators.numerics.reductions import is_finite
from estimators.numerics.tracing import is_tracing
from estimators.runtime.pass_counter import SELF_CHECK, PassCounter

__all__ = ["DISPLACED", "OUTPUTS", "DerivativeReport", "SelfCheck", "unsaturated"]

_TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
"""Largest relative error of a route that counts as round-off, by dtype. Wrong routes had errors of 0.01 to 270."""
_SECOND_DERIVATIVES = 100.0
"""Round-off of second derivatives, in units of that of first derivatives.

For saturated classes Λ = p − p² is a difference of nearly equal numbers: 1.3e-6 was measured at a converged optimum."""
_UNDERFLOW = 1e-30
"""The largest gradient that a narrower dtype may round to 0."""
_CANCELLATION = 1e-4
"""Size of a gradient, relative to one with other weights of the rows, below which its rows cancel."""
_CANCELLED = 1e3
"""Largest error of a second derivative whose terms cancel, in units of eps times its usual size."""
_FEWEST_OTHERS = 4
"""Rows without a kink at which a derivative must have agreed before it may disagree at rows with one."""
OUTPUTS, DISPLACED = "outputs", "displaced weights"
"""Names in the report of the comparisons that are not of a derivative."""


@dataclass(repr=False)
class DerivativeReport:
    """What was compared with plain autograd, and which routes were chosen because of it.

    Attributes:
        rows: number of rows compared, by what was computed ("rows of J", "J v", ...).
        largest_error: largest relative error of the routes in use, by the same names.
        routes: the route in use, by the same names.
        disagreements: one sentence per route that was replaced.
    """

    rows: dict[str, int] = field(default_factory=dict)
    largest_error: dict[str, float] = field(default_factory=dict)
    routes: dict[str, str] = field(default_factory=dict)
    disagreements: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        """Return the number of rows, the largest error and the first routes that were replaced."""
        error = max(self.largest_error.values(), default=0.0)
        replaced = "".join(f"; {text[:200]}" for text in self.disagreements[:2])
        more = f"; {len(self.disagreements) - 2} more" if len(self.disagreements) > 2 else ""
        rows = max(self.rows.values(), default=0)
        return f"DerivativeReport({rows} rows compared, largest relative error {error:.2g}{replaced}{more})"

    def record_agreement(self, what: str, rows: int, error: float) -> None:
        """Add a comparison in which a route agreed with plain autograd.

        Args:
            what: what was computed.
            rows: the number of rows that were compared.
            error: the relative error.
        """
        self.rows[what] = self.rows.get(what, 0) + rows
        self.largest_error[what] = max(error, self.largest_error.get(what, 0.0))

    def record_fallback(self, what: str, route: str, reason: str, *, instead: str) -> None:
        """Add a route that is not used any more, and warn with `DerivativeRouteWarning`.

        Args:
            what: what is computed.
            route: the route that is not used any more.
            reason: why, as a verb phrase.
            instead: the route that is used from now on.
        """
        sentence = f"{what}: {route} {reason}; {instead} instead"
        self.disagreements.append(sentence)
        warnings.warn(
            f"A fast derivative of this network was not used. {sentence}. The results are those of plain autograd.",
            DerivativeRouteWarning,
            stacklevel=2,
        )


class SelfCheck:
    """Compares derivatives with those of a reference module: once per training row, and at every query.

    Args:
        reference: the user's module, differentiated by plain autograd; a copy of it in the dtype of the computation if
            the weights are stored in another dtype.
        subset: the chosen parameters.
        pass_counter: counts the rows that go through `reference` and `stored`.
        stored: the user's module if `reference` is a copy of it. Its dtype has fewer digits.
    """

    def __init__(
        self, reference: UserModule, subset: Subset, pass_counter: PassCounter, stored: UserModule | None = None
    ) -> None:
        self.reference, self.subset, self.stored = reference, subset, stored
        self._count_with(pass_counter)
        self.report = DerivativeReport()
        self.n_data, self.fitting, self._enabled = 0, False, True
        self.gradient_seen = self._gradient_expected = False
        self._kinds = InputKinds()
        self._generator = torch.Generator().manual_seed(0)
        self._known = KnownGradients()
        self._searching = False  # for rows with kinks: gradients are neither taken from others nor kept

    @property
    def enabled(self) -> bool:
        """Whether derivatives are compared; never while operations are recorded for an exported module."""
        return self._enabled and not is_tracing()

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._enabled = enabled

    def _count_with(self, pass_counter: PassCounter) -> None:
        """Count on copies of the modules: others may share the modules, and have a counter of their own."""
        self.reference = self.reference.counted_by(pass_counter)
        self.stored = None if self.stored is None else self.stored.counted_by(pass_counter)

    def counted_by(self, pass_counter: PassCounter) -> SelfCheck:
        """A check of the same network whose rows are counted by another counter."""
        other = copy.copy(self)
        other._count_with(pass_counter)
        return other

    def for_function(self) -> SelfCheck:
        """A check of a function of these outputs: the same module and report, without remembered kinds of inputs."""
        other = copy.copy(self)
        other._kinds = InputKinds()
        return other

    def counted(self) -> AbstractContextManager[None]:
        """Count the rows inside the context as rows of the self-check."""
        return self.reference.pass_counter.phase(SELF_CHECK)

    @contextmanager
    def on_training_rows(self) -> Iterator[None]:
        """Treat inputs inside the context as training rows: each is compared once, whatever its kind."""
        before, self.fitting = self.fitting, True
        try:
            yield
        finally:
            self.fitting = before

    def is_new(self, what: str, x: PyTree, *more: object) -> bool:
        """Whether `what` has not been computed yet at inputs of the kind of x (and of `more`)."""
        return self._kinds.add(what, x, *more) and self.enabled

    def forget(self, what: str, x: PyTree) -> None:
        """Compare `what` again at the next inputs of the kind of x."""
        self._kinds.remove(what, x)

    def is_due(self, what: str, x: PyTree, *more: object) -> bool:
        """Whether `what` is to be compared at x: once at every training row, and at every query.

        Queries of one kind may differ in their values, and one row alone may take another branch of forward. Therefore
        every query is compared.
        """
        if not self.enabled or not n_rows(x):
            return False
        is_new = self.is_new(what, x, *more)
        return is_new or not self.fitting or self.report.rows.get(what, 0) < self.n_data

    def tolerance(self) -> float:
        """The largest relative error that counts as round-off."""
        return _TOLERANCES.get(self.reference.dtype, 0.1)

    def random(self, like: Tensor) -> Tensor:
        """Standard normal numbers in the shape, dtype and device of `like`, without the global random state."""
        return torch.randn(like.shape, generator=self._generator, dtype=torch.float64).to(like)

    def random_order(self, n: int) -> Tensor:
        """A random permutation of 0, ..., n − 1, without the global random state."""
        return torch.randperm(n, generator=self._generator)

    def cotangent(self, x: PyTree, like: Tensor) -> Tensor:
        """A cotangent u in the shape of `like` (B, ..., C), random or from an earlier comparison at these rows.

        The gradient of an earlier cotangent is known. Comparing another kind of product then needs no further pass over
        the training rows.
        """
        known = self._known.cotangent(x) if self.fitting else None
        if known is None or known.numel() != like.numel() or not bool(known.any()):
            return self.random(like)
        return known.reshape(like.shape).to(like)

    def forget_gradients(self) -> None:
        """Free the gradients that `cotangent` relies on, after the training rows have been compared."""
        self._known = KnownGradients()

    def gradient_error(
        self,
        x: PyTree,
        u: Tensor,
        product: Tensor,
        names: Sequence[str] | None = None,
        *,
        expected: Tensor | None = None,
    ) -> Disagreement:
        """The error of `product` (P,) against Jᵀu by plain autograd, for u (B, C).

        With `names`, `product` (P',) has the entries of these parameters only. `expected` is Jᵀu from
        `cotangent_and_gradient`, which saves a pass.
        """
        entries = self.subset.entries
        entries = entries if names is None else {name: entries[name] for name in names}
        found = self._compared(x, u, names, lambda g: largest_parameter_error(entries, product, g), expected)
        return found if found.within(self.tolerance()) else self._beside_cancellation(x, u, names, found)

    def _beside_cancellation(
        self, x: PyTree, u: Tensor, names: Sequence[str] | None, found: Disagreement
    ) -> Disagreement:
        """The error in units of a gradient in which rows do not cancel, that of u with random weights of the rows.

        The gradient of a loss may be a sum of rows that is 0 up to round-off, whose relative error means nothing.
        """
        weights = self.random(u.new_empty(len(u), *(1 for _ in u.shape[1:])))
        g = self._gradient(x, u, names)
        with self.counted():
            usual = self.reference.vjp(x, (weights * u)[None], names)[0]
        size, usual_size = float(g.double().norm()), float(usual.double().norm())
        cancels = size < _CANCELLATION * usual_size
        return replace(found, error=found.error * size / usual_size) if cancels else found

    def random_state(self) -> Tensor:
        """The state of the numbers that `random` returns, to repeat a comparison with the same ones."""
        return self._generator.get_state()

    def agrees(self, found: Disagreement, what: str | None, x: PyTree, error: ErrorOfRows, state: Tensor) -> bool:
        """Whether the error of a derivative at x is round-off, or that of few rows by kinks of each of them (`kinks`).

        Args:
            found: the error of all rows.
            what: what is computed. It must have agreed at other rows; None for plain autograd, which need not.
            x: inputs of B rows.
            error: the error with weights of the rows.
            state: the `random_state` before the comparison that found the error.
        """
        return found.within(self.tolerance()) or self._differs_at_kinks_only(what, x, error, state)

    def _differs_at_kinks_only(self, what: str | None, x: PyTree, error: ErrorOfRows, state: Tensor) -> bool:
        """Whether a derivative that disagrees at x does so at few rows, by kinks of each of them."""

        def of_same_cotangents(weights: Tensor) -> Disagreement:
            self._generator.set_state(state)
            return error(weights)

        self._searching = True
        try:
            with self.counted():
                # Plain autograd itself may be on the other side in another pass.
                if of_same_cotangents(torch.ones(n_rows(x))).within(self.tolerance()):
                    return True
                rows = disagreeing_rows(x, of_same_cotangents, self.tolerance())
                others = n_rows(x) - len(rows)
                if what is not None and others + self.report.rows.get(what, 0) < _FEWEST_OTHERS:
                    return False
                explained = (self._kink_explains(found, select_rows(x, slice(i, i + 1))) for i, found in rows.items())
                return bool(rows) and all(explained)
        finally:
            self._searching = False

    def _kink_explains(self, error: float, row: PyTree) -> bool:
        """Whether a kink at a row explains an error, of the reference or of the weights as they are stored."""
        tolerance = self.tolerance()
        fine = RoundOff(tolerance, units=4, jump=0.1 * tolerance)
        if kink_explains(error, self.reference, row, self.random, fine):
            return True
        if self.stored is None:
            return False
        tolerance = _TOLERANCES.get(self.stored.coarsest_dtype, 0.1)
        return kink_explains(error, self.stored, row, self.random, RoundOff(tolerance, units=1, jump=tolerance))

    def cotangent_and_gradient(self, x: PyTree, cotangent: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The cotangent u (B, C) that a function makes from the outputs f (B, C), and Jᵀu (P,) by plain autograd.

        One forward pass serves both, if what is compared needs the outputs first.
        """
        made: list[Tensor] = []

        def of_outputs(f: Tensor) -> Tensor:
            made.append(cotangent(f))
            return made[0][None]

        with self.counted():
            g = self.reference.outputs_and_vjp(x, of_outputs)[1]
        return made[0], g[0]

    def directional_error(
        self, x: PyTree, cotangent: Tensor, jvp: Tensor, r: Tensor, *, u: Tensor | None = None
    ) -> Disagreement:
        """The error of ⟨u, jvp⟩ for jvp = J r (B, C) against ⟨g, r⟩, r (P,), with g by plain autograd.

        Args:
            x: inputs of B rows.
            cotangent: the weights of the module's outputs in g, (B, C).
            jvp: J r.
            r: a direction of the parameters.
            u: the weights of `jvp` if they differ from `cotangent`. For a function of the outputs with Jacobian G,
                `cotangent` is Gᵀu.
        """
        weights = cotangent if u is None else u
        return self._compared(x, cotangent, None, lambda g: error_along_direction(weights, jvp, g, r))

    def curvature_error(
        self, product: Tensor, expected: Tensor, usual: Callable[[], tuple[Tensor, Tensor]]
    ) -> Disagreement:
        """The error of H v (P,) against plain autograd, in units of the round-off of second derivatives.

        Args:
            product: H v.
            expected: H v by plain autograd.
            usual: computes H r (P,) of the `unsaturated` loss by the same route and by plain autograd, for a random r
                with the norm of v. Where Λ = p − p² or J v cancels, H v is round-off, of the size of eps times this;
                the route is then judged by H r.
        """
        self._note_gradient(expected, expected)
        found = self._second_derivative_error(product, expected)
        if found.within(self.tolerance()):
            return found
        with self.counted():
            route, plain = usual()
        error, size = (float(vector.double().norm()) for vector in (product.double() - expected.double(), plain))
        is_round_off = error <= _CANCELLED * torch.finfo(expected.dtype).eps * size < math.inf
        return self._second_derivative_error(route, plain) if is_round_off else found

    def _second_derivative_error(self, product: Tensor, expected: Tensor) -> Disagreement:
        """The relative error of a product with a Hessian."""
        found = largest_parameter_error(self.subset.entries, product, expected)
        return replace(found, allowance=_SECOND_DERIVATIVES)

    def _compared(
        self,
        x: PyTree,
        u: Tensor,
        names: Sequence[str] | None,
        error: Callable[[Tensor], Disagreement],
        expected: Tensor | None = None,
    ) -> Disagreement:
        """The error against Jᵀu by the reference; if that is small and weights are stored in another dtype, by these.

        The stored module has fewer digits, so its own tolerance decides.
        """
        g = self._gradient(x, u, names) if expected is None else expected
        self._check_finite(g)
        self._note_gradient(u, g)
        found = error(g)
        if self.stored is None or not found.within(self.tolerance()):
            return found
        with self.counted():
            stored = self.stored.vjp(x, u[None], names)[0]
        if not bool(stored.any()) and float(g.abs().max()) < _UNDERFLOW:
            return found
        by_stored = error(stored)
        return found if by_stored.within(_TOLERANCES.get(self.stored.coarsest_dtype, 0.1)) else by_stored

    def _gradient(self, x: PyTree, u: Tensor, names: Sequence[str] | None = None) -> Tensor:
        """Jᵀu (P,) by plain autograd for u (B, C), or its entries of the parameters `names`; computed, or known."""
        key = self._known.key(x) if self.fitting and not self._searching else None
        known = None if key is None else self._known.gradient(key, u)
        if known is not None:
            return known if names is None else torch.cat([known[self.subset.slices[name]] for name in names])
        with self.counted():
            g = self.reference.vjp(x, u[None], names)[0]
        if key is not None and names is None:
            self._known.keep(key, u, g)
        return g

    def check_gradient(self) -> None:
        """Check that a gradient has reached a chosen parameter, if gradients were compared.

        Raises:
            ModelError: all gradients were exactly 0.
        """
        if self.enabled and self._gradient_expected and not self.gradient_seen:
            raise ModelError(
                "outputs with a gradient with respect to the chosen parameters",
                received="a gradient of exactly 0 at every row (outputs detached, or computed under torch.no_grad())",
                remedy="remove .detach(), .data, .item() or torch.no_grad() from forward, or choose the parameters "
                "that the outputs depend on by subset_of_weights.",
            )

    def _note_gradient(self, u: Tensor, g: Tensor) -> None:
        if self._searching:
            return
        self.note_gradient(expected=bool(u.any()), seen=bool(g.any()))

    def note_gradient(self, *, expected: bool, seen: bool) -> None:
        """Note whether g is non-zero (`seen`) and the cotangent u is (`expected`); check it at a query."""
        self.gradient_seen = self.gradient_seen or seen
        self._gradient_expected = self._gradient_expected or expected
        if not self.fitting:
            self.check_gradient()

    def _check_finite(self, g: Tensor) -> None:
        """Raise ModelError, with the names of the parameters, if the gradient g is not finite."""
        if is_finite(g):
            return
        slices = self.subset.slices if len(g) == self.subset.n_parameters else {}
        names = [name for name, entries in slices.items() if not bool(torch.isfinite(g[entries]).all())]
        listed = ", ".join(names[:3]) or "the last layer"
        raise ModelError(
            "finite gradients of the outputs",
            received=f"NaN or Inf in the gradient of {listed}",
            remedy="look for sqrt, norm, log or a division at 0 in forward, and add a small constant inside it.",
        )


def unsaturated(loss: Callable[[Tensor], Tensor], f: Tensor) -> Callable[[Tensor], Tensor]:
    """The loss s² ℓ(f / s) with s = max(1, max |f|), less its gradient: f / s in [−1, 1] is no saturated class.

    Its Hessian at f is JᵀΛJ with Λ = ∇²ℓ(f / s), and thus that of ℓ itself if ℓ is quadratic.

    Args:
        loss: ℓ, f (B, C) -> a scalar.
        f: the outputs at which it is differentiated, (B, C).

    Returns:
        f (B, C) -> a scalar.
    """
    scale = f.detach().abs().max().clamp(min=1.0)
    with torch.enable_grad():
        at = (f.detach() / scale).requires_grad_()
        gradient = torch.autograd.grad(loss(at), at)[0]
    return lambda f: scale**2 * (loss(f / scale) - (gradient * f / scale).sum())
