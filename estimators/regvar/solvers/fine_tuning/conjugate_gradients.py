"""Refits by plain gradients of all rows along conjugate directions: no learning rate, for data sets that are small.

∇F of a centred objective is A D − ∇r up to O(λ), so that the slopes at two points of a line tell A along it:

    A p = [∇F(D + τ p) − ∇F(D)]/τ          D ← D − (pᵀg/pᵀA p) p          g ← g − (pᵀg/pᵀA p) A p

In the end g is computed as A D − ∇r, by a product with A. Where that is not small, it goes on with what λ bends of ∇F
taken off, b = ∇F(D) − (A D − ∇r), which is nearly the same everywhere near (defect correction).
One gradient of each replica a step (Polak & Ribière 1969). Where stochastic gradients need a few hundred steps whatever
the rows, these need about as many as there are distinct sizes of curvature.
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
from estimators.regvar.a_norm_error import SampleANormErrors, prior_energy
from estimators.regvar.solvers.fine_tuning.nonlinearity import straightest_lam
from estimators.regvar.solvers.perturbed_copies import PerturbedCopies
from estimators.runtime.progress import track

__all__ = ["ConjugateRefits", "conjugate_refits"]

_ENOUGH = 0.1  # energy error per dimension, by what the slopes are followed to be
_TRUSTED = 2.0  # times that, by the slopes anew in the end
_FIRST = 1e-3  # of ‖D‖: the first step to try
_SEEN = 0.05  # of uᵀGu: what a step to try adds to F, so that round-off does not hide it
_LOOKED_AGAIN, _ALIKE = 8, 3.0
_LAST = 3  # steps in which the error must not have fallen by more than what is enough, as chance cannot tell


def conjugate_refits(
    replicas: PerturbedCopies, most: int, checkpoint: Checkpoint, *, chooses: bool = False, progress_bar: bool = False
) -> ConjugateRefits:
    """Refits of posterior draws from their start, by at most `most` steps.

    They end where the energy error is small, for which it costs nothing to look; slopes that have been followed are
    then computed anew, and it goes on where they disagree. Where it `chooses` λ, it does again after some steps: at the
    start much is bent that is straight in the end.
    """
    saved = checkpoint.load()
    refits = ConjugateRefits.begun(replicas) if saved is None else ConjugateRefits.resumed(replicas, saved)
    for _ in track(range(refits.steps, most), "steps", shown=progress_bar):
        if chooses and refits.steps == _LOOKED_AGAIN:
            refits.choose_again()
        if refits.enough(_ENOUGH):
            refits.look_at_limit()
            if refits.enough(_TRUSTED * _ENOUGH):
                return refits
        refits.step()
        checkpoint.save(refits.state)
    refits.look_at_limit()
    return refits


@dataclass
class ConjugateRefits:
    """D, slopes g, what is `bent` b (None: not taken off) and directions p, all (K, P); τ `tried` (K,).

    fell (3, K): ‖D − A⁻¹∇r‖²_A, in the last steps.
    """

    replicas: PerturbedCopies
    at: Tensor
    slope: Tensor
    direction: Tensor
    tried: Tensor
    fell: Tensor
    bent: Tensor | None = None
    steps: int = 0
    corrects: bool = False
    _prior: tuple[float, Tensor] | None = None
    _known: SampleANormErrors | None = None

    _TENSORS: ClassVar = ("at", "slope", "direction", "tried", "fell")

    @property
    def lam(self) -> float:
        """λ by now."""
        return self.replicas.lam

    def choose_again(self) -> None:
        """λ between the one that the slopes at the start wanted, and what the first replica's next step does.

        The first keeps the end right, the second keeps round-off out of the steps.
        """
        at, step = self.at[:1], float(self.tried[0]) * self.direction[:1]
        lam = straightest_lam(self.replicas.objective, self.replicas.perturbation, at, step)
        if lam > _ALIKE * self.lam:
            self.replicas = replace(self.replicas, lam=math.sqrt(lam * self.lam))
            if self.corrects:
                self.look_at_limit()
            else:
                self._turn(self.replicas.gradient(self.at))

    @classmethod
    def begun(cls, replicas: PerturbedCopies) -> ConjugateRefits:
        """At the start, along the steepest descent."""
        at = replicas.start
        slope = replicas.gradient(at)
        length = dots(at, at).sqrt()  # 0 where nothing has a prior
        tried = _FIRST * torch.where(length > 0, length, 1.0) / norms(slope)
        return cls(replicas, at, slope, -slope, tried, torch.full_like(tried, math.inf).repeat(_LAST, 1))

    @classmethod
    def resumed(cls, replicas: PerturbedCopies, saved: Learned) -> ConjugateRefits:
        """From `state()`."""
        device = replicas.objective.theta.device
        at, slope, direction, tried, fell = (saved[0][name].to(device) for name in cls._TENSORS)
        bent = saved[0]["bent"].to(device) if "bent" in saved[0] else None
        return cls(replicas, at, slope, direction, tried, fell, bent, saved[1]["steps"], saved[1]["corrects"])

    def state(self) -> Learned:
        tensors = {name: getattr(self, name) for name in self._TENSORS}
        tensors |= {} if self.bent is None else {"bent": self.bent}
        return tensors, {"steps": self.steps, "corrects": self.corrects, "lam": self.replicas.lam}

    def step(self) -> None:
        """To the least of F along p, and the next direction."""
        if self.corrects and self.bent is None:
            self.bent = self.replicas.gradient(self.at).sub_(self.slope)
        along, norm = dots(self.direction, self.slope), dots(self.slope, self.slope)
        length = dots(self.direction, self.direction)
        _add(self.at, self.direction, self.tried)
        image = self.replicas.gradient(self.at).sub_(self.slope)  # τ A p
        if self.bent is not None:
            image.sub_(self.bent)
        bend = dots(self.direction, image) / self.tried  # pᵀA p
        steps = torch.where(bend > 0, -along / torch.maximum(bend, self._least * length), 0.0)
        _add(self.at, self.direction, steps - self.tried)
        _add(self.slope, image, steps / self.tried)
        turned = steps / self.tried * dots(self.slope, image) / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        for p, g, factor in zip(self.direction, self.slope, turned.clamp_min(0).tolist(), strict=True):
            p.mul_(factor).sub_(g)
        self._known = None
        next_bend = bend / length * dots(self.direction, self.direction)  # as if A were alike along both
        seen = torch.where(next_bend > 0, (_SEEN * self.energies.dimensions / next_bend).sqrt(), steps)
        self.tried = torch.where(bend > 0, torch.maximum(steps, seen), 0.5 * self.tried)
        self.fell = torch.cat([self.fell[1:], -(along * steps)[None]])
        self.steps += 1

    def look_at_limit(self) -> None:
        """The slopes of the limit at D, instead of those that were followed; steps from here go to its least."""
        self._turn(self.replicas.objective.product(self.at).sub_(self.replicas.perturbation.direction))
        self.corrects, self.bent = True, None

    def _turn(self, slope: Tensor) -> None:
        """Along the steepest descent of other slopes at D; τ p is as long as before."""
        self.tried = self.tried * norms(self.direction) / norms(slope)
        self.slope, self.direction, self._known = slope, -slope, None

    @property
    def _least(self) -> float:
        """No curvature is less than this."""
        return float(self.replicas.objective.prior.precision.min())

    def enough(self, wanted: float) -> bool:
        """Whether the energy error is at most what is wanted by its bound; or by its estimate, and it falls no more."""
        energies = self.energies
        error, fell = energies.error, float(self.fell.sum(0).mean() / energies.dimensions.mean())
        return error.bound <= wanted or max(error.per_dimension, fell) <= wanted

    @property
    def energies(self) -> SampleANormErrors:
        """At D."""
        perturbation, delta = self.replicas.perturbation, self.replicas.objective.prior.precision
        self._prior = prior_energy(perturbation, delta) if self._prior is None else self._prior
        if self._known is None:
            self._known = SampleANormErrors.of(perturbation, delta, self.at, self.slope, self._prior)
        return self._known


def _add(rows: Tensor, others: Tensor, factors: Tensor) -> None:
    """Each of others (K, P) times its factor (K,) to rows, in place and without a copy."""
    for row, other, factor in zip(rows, others, factors.tolist(), strict=True):
        row.add_(other, alpha=factor)
