"""Refits by nonlinear conjugate gradients over all rows: no learning rate, for small data sets.

For a centred objective ∇F(D) = A D − ∇r up to O(λ), so that the gradients at two points of a line give A along it:

    A p = [∇F(D + τ p) − ∇F(D)]/τ          D ← D − (pᵀg/pᵀA p) p          g ← g − (pᵀg/pᵀA p) A p

At the end, g is recomputed as A D − ∇r by a product with A. If it is not small, the refits continue with the nonlinear
part of ∇F subtracted, b = ∇F(D) − (A D − ∇r), which is nearly constant near D (defect correction).
Each step costs one gradient per perturbed copy (Polak & Ribière 1969). Stochastic gradients need a few hundred steps at
any number of rows; conjugate gradients need about as many steps as A has distinct eigenvalues.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from estimators.numerics.reductions import dots, norms
from estimators.persistence.checkpoint import Checkpoint
from estimators.persistence.state import Learned
from estimators.regvar.a_norm_error import SampleANormErrors, prior_draw_norms
from estimators.regvar.solvers.fine_tuning.nonlinearity import select_lam
from estimators.regvar.solvers.perturbed_copies import PerturbedCopies
from estimators.runtime.progress import track

__all__ = ["ConjugateRefits", "conjugate_refits"]

_TARGET_ERROR = 0.1  # A-norm error per dimension to reach, by the updated gradients
_RECOMPUTED_FACTOR = 2.0  # times _TARGET_ERROR: accepted for the recomputed gradients
_FIRST_TRIAL = 1e-3  # times ‖D‖: length of the first trial step τ p
_TRIAL_INCREASE = 0.05  # times uᵀGu: increase of F by a trial step, so that it exceeds round-off
_SELECT_AGAIN_AT, _MIN_RATIO = 8, 3.0  # step at which λ is selected again; ratio to the old λ from which it changes
_RECENT = 3  # steps whose decrease must be small too, since the error estimate is random


def conjugate_refits(
    copies: PerturbedCopies, most: int, checkpoint: Checkpoint, *, selects_lam: bool = False, progress_bar: bool = False
) -> ConjugateRefits:
    """Refit posterior draws from their initial guess, by at most `most` steps.

    They stop if the A-norm error is small, which costs nothing to check. The updated gradients are then recomputed, and
    the refits continue if the two disagree. With `selects_lam`, λ is selected again after some steps: the network is
    less linear at the initial guess than at the end.
    """
    saved = checkpoint.load()
    refits = ConjugateRefits.begun(copies) if saved is None else ConjugateRefits.resumed(copies, saved)
    for _ in track(range(refits.steps, most), "steps", shown=progress_bar):
        if selects_lam and refits.steps == _SELECT_AGAIN_AT:
            refits.select_lam_again()
        if refits.enough(_TARGET_ERROR):
            refits.recompute_slope()
            if refits.enough(_RECOMPUTED_FACTOR * _TARGET_ERROR):
                return refits
        refits.step()
        checkpoint.save(refits.state)
    refits.recompute_slope()
    return refits


@dataclass
class ConjugateRefits:
    """State of the refits: displacements D `at`, gradients g `slope`, directions p, (K, P) each; trial steps τ, (K,).

    `nonlinear_part` is b, (K, P), or None if it is not subtracted.
    `decreases` are those of ‖D − A⁻¹∇r‖²_A in the last steps, (3, K).
    """

    copies: PerturbedCopies
    at: Tensor
    slope: Tensor
    direction: Tensor
    tried: Tensor
    decreases: Tensor
    nonlinear_part: Tensor | None = None
    steps: int = 0
    corrects: bool = False
    _prior: tuple[float, Tensor] | None = None
    _known: SampleANormErrors | None = None

    _TENSORS: ClassVar = ("at", "slope", "direction", "tried", "decreases")

    @property
    def lam(self) -> float:
        """The current λ."""
        return self.copies.lam

    def select_lam_again(self) -> None:
        """Select λ again: the geometric mean of the λ for the first copy's next step and the current λ.

        The first keeps the end accurate, the second keeps round-off out of the steps.
        """
        at, step = self.at[:1], float(self.tried[0]) * self.direction[:1]
        lam = select_lam(self.copies.objective, self.copies.perturbation, at, step)
        if lam > _MIN_RATIO * self.lam:
            self.copies = replace(self.copies, lam=math.sqrt(lam * self.lam))
            if self.corrects:
                self.recompute_slope()
            else:
                self._restart(self.copies.gradient(self.at))

    @classmethod
    def begun(cls, copies: PerturbedCopies) -> ConjugateRefits:
        """Return refits at the initial guess, with the steepest descent as direction."""
        at = copies.initial_guess
        slope = copies.gradient(at)
        length = dots(at, at).sqrt()  # 0 if no parameter has a prior
        tried = _FIRST_TRIAL * torch.where(length > 0, length, 1.0) / norms(slope)
        return cls(copies, at, slope, -slope, tried, torch.full_like(tried, math.inf).repeat(_RECENT, 1))

    @classmethod
    def resumed(cls, copies: PerturbedCopies, saved: Learned) -> ConjugateRefits:
        """Return the refits that `state` describes."""
        device = copies.objective.theta.device
        at, slope, direction, tried, decreases = (saved[0][name].to(device) for name in cls._TENSORS)
        nonlinear_part = saved[0]["nonlinear_part"].to(device) if "nonlinear_part" in saved[0] else None
        return cls(
            copies, at, slope, direction, tried, decreases, nonlinear_part, saved[1]["steps"], saved[1]["corrects"]
        )

    def state(self) -> Learned:
        tensors = {name: getattr(self, name) for name in self._TENSORS}
        tensors |= {} if self.nonlinear_part is None else {"nonlinear_part": self.nonlinear_part}
        return tensors, {"steps": self.steps, "corrects": self.corrects, "lam": self.copies.lam}

    def step(self) -> None:
        """Move to the minimum of F along p, and compute the next direction."""
        if self.corrects and self.nonlinear_part is None:
            self.nonlinear_part = self.copies.gradient(self.at).sub_(self.slope)
        along, norm = dots(self.direction, self.slope), dots(self.slope, self.slope)
        length = dots(self.direction, self.direction)
        _add(self.at, self.direction, self.tried)
        image = self.copies.gradient(self.at).sub_(self.slope)  # τ A p
        if self.nonlinear_part is not None:
            image.sub_(self.nonlinear_part)
        curvature = dots(self.direction, image) / self.tried  # pᵀA p
        steps = torch.where(curvature > 0, -along / torch.maximum(curvature, self._least * length), 0.0)
        _add(self.at, self.direction, steps - self.tried)
        _add(self.slope, image, steps / self.tried)
        turned = steps / self.tried * dots(self.slope, image) / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        for p, g, factor in zip(self.direction, self.slope, turned.clamp_min(0).tolist(), strict=True):
            p.mul_(factor).sub_(g)
        self._known = None
        next_curvature = (
            curvature / length * dots(self.direction, self.direction)
        )  # assumes equal curvature along both directions
        seen = torch.where(
            next_curvature > 0, (_TRIAL_INCREASE * self.a_norm_errors.dimensions / next_curvature).sqrt(), steps
        )
        self.tried = torch.where(curvature > 0, torch.maximum(steps, seen), 0.5 * self.tried)
        self.decreases = torch.cat([self.decreases[1:], -(along * steps)[None]])
        self.steps += 1

    def recompute_slope(self) -> None:
        """Replace the updated gradients by A D − ∇r; later steps minimise the limit λ → 0."""
        self._restart(self.copies.objective.product(self.at).sub_(self.copies.perturbation.gradient))
        self.corrects, self.nonlinear_part = True, None

    def _restart(self, slope: Tensor) -> None:
        """Restart with the steepest descent of new gradients at D; τ p keeps its length."""
        self.tried = self.tried * norms(self.direction) / norms(slope)
        self.slope, self.direction, self._known = slope, -slope, None

    @property
    def _least(self) -> float:
        """Lower bound of the curvature along any direction: the smallest δ."""
        return float(self.copies.objective.prior.precision.min())

    def enough(self, wanted: float) -> bool:
        """Return whether the A-norm error is at most `wanted`, by its bound or by its estimate and recent decrease."""
        a_norm_errors = self.a_norm_errors
        error, decreases = a_norm_errors.error, float(self.decreases.sum(0).mean() / a_norm_errors.dimensions.mean())
        return error.bound <= wanted or max(error.per_dimension, decreases) <= wanted

    @property
    def a_norm_errors(self) -> SampleANormErrors:
        """A-norm errors at D."""
        perturbation, delta = self.copies.perturbation, self.copies.objective.prior.precision
        self._prior = prior_draw_norms(perturbation, delta) if self._prior is None else self._prior
        if self._known is None:
            self._known = SampleANormErrors.of(perturbation, delta, self.at, self.slope, self._prior)
        return self._known


def _add(rows: Tensor, others: Tensor, factors: Tensor) -> None:
    """Add each of others (K, P) times its factor (K,) to rows, in place."""
    for row, other, factor in zip(rows, others, factors.tolist(), strict=True):
        row.add_(other, alpha=factor)
