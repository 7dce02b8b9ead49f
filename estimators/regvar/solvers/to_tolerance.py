"""LinearResponse until the error of the variance, measured at probes, is below a tolerance."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

from estimators.curvature.krylov.block_cg import BlockSolution, check_condition
from estimators.curvature.krylov.block_lanczos import BlockLanczos
from estimators.curvature.krylov.krylov_space import KrylovSpace
from estimators.curvature.krylov.whitening import PriorWhitening
from estimators.numerics.reductions import norms
from estimators.objective.objective import Objective
from estimators.persistence.checkpoint import Checkpoint
from estimators.persistence.state import Learned
from estimators.regvar.a_norm_error import SampleANormErrors
from estimators.regvar.bounds import Bounds, LeadingSpace
from estimators.regvar.measured_bounds import MeasuredAccuracy
from estimators.regvar.perturbation import Perturbation
from estimators.regvar.probe_rows import ProbeRows
from estimators.regvar.solvers.base import Solution, Solver, SolverReport

__all__ = ["LinearResponseToTolerance"]

_N_PROBES = 16
"""Probes of one measurement: the root mean square of 16 errors has a standard error of 18 %."""
_ERROR_PER_GAP = 0.08
"""Error of the estimate over the relative distance of the bounds; 0.05 to 0.1 on the bundled tasks.

It only decides when to measure: docs/benchmarks/tolerance.md.
"""
_TIGHT = 0.25
"""Distance of the bounds at the probes, relative to rtol, at which the variance there counts as known."""
_SAFETY = 0.8
"""Factor on the distance of the bounds that is expected to suffice, after a measured error above rtol."""
_MIN_ITERATIONS = 3
"""Iterations before the first measurement, which needs a smaller leading space."""
_MAX_RANK = 2048
"""Largest number of vectors in the space: the matrices of this size take seconds to factor."""
_MAX_BYTES = 2**31
"""Largest memory of the space, 2 GiB."""
_PROBE_ITERATIONS = 3
"""Iterations that the probes need; room for them is kept free."""


class LinearResponseToTolerance(Solver):
    """Grows the Krylov space of all draws until the variance has a relative root-mean-square error of at most rtol.

    The error is measured: at 16 probes, training rows and rows unlike them, the space is extended by their gradients
    until the variance there is known. If the error of the estimate from the space before is above rtol, the larger
    space grows on, and the next measurement takes other rows. A space that spans all of θ gives the exact variance.

    Args:
        rtol: relative error to reach.
        seed: seed of the probes.
    """

    refits = False

    def __init__(self, rtol: float, seed: int = 0) -> None:
        self.rtol, self.seed = rtol, seed

    def __repr__(self) -> str:
        return f"LinearResponse to rtol={self.rtol:g}"

    @staticmethod
    def max_rank(objective: Objective) -> int:
        """Return the largest number of vectors that the space may have."""
        theta = objective.theta
        room = min(_MAX_BYTES, objective.available_bytes() // 3) // (theta.numel() * theta.element_size())
        return min(theta.numel(), _MAX_RANK, room)

    @classmethod
    def fits(cls, objective: Objective, n_draws: int) -> bool:
        """Return whether there is room for a space that can be measured."""
        enough = (_MIN_ITERATIONS + 1) * n_draws + _PROBE_ITERATIONS * (n_draws + _N_PROBES)
        return cls.max_rank(objective) >= min(enough, objective.theta.numel())

    def _solve(
        self,
        objective: Objective,
        perturbation: Perturbation,
        *,
        progress_bar: bool,  # noqa: ARG002
        checkpoint: Checkpoint,
    ) -> Solution:
        growth = _Growth.begun(self, objective, perturbation, checkpoint.load())
        while growth.accuracy is None:
            growth.advance()
            checkpoint.save(growth.state)
        return growth.solution(repr(self))


@dataclass
class _Growth:
    """The state of a solve, which alternates between growing the space and measuring its error.

    Args:
        level: the leading space whose error is being measured; None while the space grows.
        ranks: every leading space so far.
        wanted_gap: relative distance of the bounds at which the next measurement begins.
        measurements: number of finished measurements.
        accuracy: the final measurement.
    """

    solver: LinearResponseToTolerance
    objective: Objective
    perturbation: Perturbation
    coordinates: PriorWhitening
    cycle: BlockLanczos
    max_rank: int
    wanted_gap: float
    level: LeadingSpace | None = None
    ranks: list[LeadingSpace] = field(default_factory=list)
    measurements: int = 0
    accuracy: MeasuredAccuracy | None = None
    _probes: ProbeRows | None = None

    @classmethod
    def begun(
        cls,
        solver: LinearResponseToTolerance,
        objective: Objective,
        perturbation: Perturbation,
        saved: Learned | None,
    ) -> Self:
        """Return the state at the initial guess, or the saved one."""
        coordinates = PriorWhitening.of(objective.prior.precision)
        product, free = coordinates.product(objective.product), objective.available_bytes
        max_rank = solver.max_rank(objective)
        if saved is None:
            right_hand_sides = coordinates.whiten_rhs(perturbation.gradient)
            guess = coordinates.whiten(perturbation.initial_guess)
            residual = right_hand_sides.clone() if guess is None else product(guess).neg_().add_(right_hand_sides)
            cycle = BlockLanczos(product, residual, free_bytes=free)
            wanted_gap = solver.rtol / _ERROR_PER_GAP
            return cls(solver, objective, perturbation, coordinates, cycle, max_rank, wanted_gap)
        tensors, values = saved
        cycle = BlockLanczos.restored(
            product, {name: tensor.to(perturbation.gradient.device) for name, tensor in tensors.items()}, free_bytes=free
        )
        known: dict[str, Any] = {**values, "ranks": [(rank, block) for rank, block in values["ranks"]]}
        known["level"] = None if values["level"] is None else (values["level"][0], values["level"][1])
        return cls(solver, objective, perturbation, coordinates, cycle, max_rank, **known)

    def state(self) -> Learned:
        """Return the tensors and values from which `begun` continues."""
        values = {"wanted_gap": self.wanted_gap, "level": self.level, "ranks": self.ranks}
        return self.cycle.tensors(), {**values, "measurements": self.measurements}

    def advance(self) -> None:
        """Add a block to the space, or begin or end a measurement."""
        if self.level is None and self._is_due():
            self._begin_measurement()
        elif self.level is not None and self._is_known():
            self._end_measurement(self.level)
        else:
            self._extend()

    @property
    def probes(self) -> ProbeRows:
        """The probes of the current measurement: other rows each time, since the space contains the former ones."""
        if self._probes is None:
            with self.objective.network.pass_counter.phase("probes"):
                self._probes = ProbeRows.of(self.objective, _N_PROBES, self.solver.seed + self.measurements)
        return self._probes

    def _extend(self) -> None:
        self.cycle.extend()
        smallest = self.coordinates.unit if self.objective.data_term.semidefinite else 0.0
        check_condition(self.cycle.projected, smallest, self.objective.theta.dtype)
        self.ranks.append((self.cycle.rank, len(self.cycle.block)))

    def _room(self) -> int:
        """Return how many more vectors the space may have."""
        return self.max_rank - self.cycle.rank - len(self.cycle.block)

    def _gap(self) -> float:
        """Return the mean distance of the bounds at the probes, relative to their mean."""
        lower, upper = self._bounds([])[-1]
        return float((2 * (upper - lower) / (upper + lower)).mean())

    def _is_due(self) -> bool:
        """Return whether the error is expected to be small enough, or the space cannot grow further."""
        if not len(self.cycle.block):
            return True
        if len(self.ranks) < _MIN_ITERATIONS:
            return False
        reserved = _PROBE_ITERATIONS * (len(self.cycle.block) + len(self.probes.gradients))
        spans_all = self.max_rank == self.objective.theta.numel()
        return (self._room() < reserved and not spans_all) or self._gap() <= self.wanted_gap

    def _begin_measurement(self) -> None:
        self.level = (self.cycle.rank, len(self.cycle.block))
        if len(self.cycle.block) and self._gap() > _TIGHT * self.solver.rtol:
            self.cycle.augment(self.coordinates.whiten_rhs(self.probes.gradients))

    def _is_known(self) -> bool:
        """Return whether the variance at the probes is known, or the space cannot grow further."""
        return self._is_final() or self._gap() <= _TIGHT * self.solver.rtol

    def _is_final(self) -> bool:
        spans_all = self.max_rank == self.objective.theta.numel()
        return not len(self.cycle.block) or (self._room() < 0 and not spans_all)

    def _end_measurement(self, level: LeadingSpace) -> None:
        earlier = min(self.ranks, key=lambda leading: abs(leading[0] - 2 * level[0] / 3))
        before, at, known = self._bounds([earlier, level])
        accuracy = MeasuredAccuracy.of((earlier, level), (before, at, known), perturbed=self.probes.perturbed)
        if accuracy.relative_error <= self.solver.rtol or self._is_final():
            self.accuracy = accuracy
            return
        gap = float((2 * (at[1] - at[0]) / (at[1] + at[0])).mean())
        self.wanted_gap = _SAFETY * gap * self.solver.rtol / accuracy.relative_error
        self.measurements, self.level, self._probes = self.measurements + 1, None, None

    def _bounds(self, leading: list[LeadingSpace]) -> list[Bounds]:
        """Return the bounds at the probes, from leading spaces and the whole space."""
        assert self.perturbation.bounds_of is not None
        bounds = self.perturbation.bounds_of(self._space(self._solved(with_solution=False)), leading)
        return bounds.variances_of_gradients(self.probes.gradients)

    def _space(self, solved: BlockSolution) -> KrylovSpace:
        return KrylovSpace.of(solved, self.coordinates, self.objective.prior.precision)

    def _solved(self, *, with_solution: bool) -> BlockSolution:
        """Return the space, with the solution for the draws if that is wanted."""
        cycle, right_hand_sides = self.cycle, self.coordinates.whiten_rhs(self.perturbation.gradient)
        solution = right_hand_sides
        if with_solution:
            cycle.solve()
            solution = cycle.correction()
            guess = self.coordinates.whiten(self.perturbation.initial_guess)
            solution = solution if guess is None else solution.add_(guess)
        residuals = cycle.residual_norms() / norms(right_hand_sides)
        space = (cycle.extended, cycle.projected, cycle.full_coupling())
        return BlockSolution(
            solution, cycle.residual_coefficients, residuals, len(self.ranks), cycle.products, *space
        )

    def solution(self, name: str) -> Solution:
        """Return the solution for the draws, with the space and its accuracy."""
        solved, delta = self._solved(with_solution=True), self.objective.prior.precision
        report = SolverReport(
            name,
            n_perturbations=len(self.perturbation.gradient),
            iterations=solved.iterations,
            residual=float(solved.residuals.max()),
        )
        errors = SampleANormErrors.from_block_cg(self.perturbation, delta, self.coordinates, solved)
        displacement = self.coordinates.unwhiten_(solved.solution)
        return Solution(displacement, report, errors, self._space(solved), self.accuracy)

