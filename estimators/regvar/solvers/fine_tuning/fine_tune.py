"""Fine-tune: minibatch refits at a finite λ, the route for networks of any size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from estimators.data.distributed import ProcessGroup
from estimators.errors import LambdaTooLargeError, OptionError
from estimators.objective.objective import Objective
from estimators.option_checks import checked_choice, checked_instance, checked_integer, checked_seed
from estimators.persistence.checkpoint import Checkpoint
from estimators.regvar.perturbation import Perturbation
from estimators.regvar.solvers.base import Solution, Solver, SolverReport, checked_lam
from estimators.regvar.solvers.fine_tuning.conjugate_gradients import conjugate_refits
from estimators.regvar.solvers.fine_tuning.nonlinearity import auto_lam, nonlinearity
from estimators.regvar.solvers.fine_tuning.sample_batches import Flights, Landed, most_in_flight, replicas_at_once
from estimators.regvar.solvers.fine_tuning.sgd import Descent
from estimators.regvar.solvers.fine_tuning.stopping import LONGEST, Stopping
from estimators.regvar.solvers.perturbed_copies import PerturbedCopies, checked_difference
from estimators.training.learning_rate import auto_learning_rate
from estimators.training.training import Recipe, fit_weights

__all__ = ["FineTune"]

DEFAULT_RECIPE = Recipe(
    epochs="auto", batch_size="auto", optimizer="auto", lr="auto", momentum=0.95, schedule="constant", average=0.3
)
_FEW_ROWS = 25  # epochs that stochastic gradients would take: conjugate ones need fewer, docs/math.md, section 6
_BENT = 0.5  # saturating networks tend to 1


class FineTune(Solver):
    """argmin L − λ r by stochastic gradient descent, all replicas on the same batches, started at the first guess.

    Only plain gradients of a plain loss. For posterior draws the start is the prior draw, already the answer where the
    data say nothing. What is stored is the displacement (θ − θ̂)/λ.

    Args:
        lam: λ, or "auto": where the slopes of a refit at its start are nearest to those of the linear response, between
            what the network bends and what round-off takes; of an objective that is not centred the largest whose start
            keeps the network linear, ‖Δf − JΔθ‖/‖JΔθ‖ ≤ 0.05 (0.005 in float64).
        difference: "forward" (one arm, enough for a centred objective), "central" or "control".
        recipe: epochs, batches and optimizer. lr="auto" takes a stable rate from the curvature of some batches, and
            half of it from each epoch on in which the objective climbs. epochs="auto" with a constant rate stops
            posterior draws early where their energy error is small, and gives them twice the epochs where it is not.
            optimizer="auto" goes along conjugate directions of all rows, without a rate, where the rows are so few that
            stochastic gradients would take more than 25 epochs, and the refits are posterior draws.
        seed: orders the batches, alike in all arms.
        vmap_chunk_size: copies in one vectorised call, or "auto" (one at a time for convolutions on a CPU, where
            grouped convolutions are slow; else as many as memory allows). It does not affect the fit: a saved fit or
            a checkpoint may be read with another value.
        in_flight: replicas that descend together, each with eight vectors of θ's size in memory; the others wait, and
            share no forward passes with them. "auto": as many as an eighth of the memory bears (all, in several
            processes).
        share: what several processes (`fit(accelerator=...)`) divide among them: the "rows" of every batch, at a sum
            over all at every step; or the "draws", each on all rows, which meet once an epoch, but cannot go on from a
            checkpoint.

    Errors: LambdaTooLargeError where the refit ends outside the linear region; ConvergenceError where it diverges.
    """

    refits = True
    not_compared: ClassVar = frozenset({"vmap_chunk_size"})
    """Options that change the memory and the time of a fit, and its result by round-off only."""

    def __init__(
        self,
        lam: float | str = "auto",
        difference: str = "forward",
        recipe: Recipe = DEFAULT_RECIPE,
        *,
        seed: int = 0,
        vmap_chunk_size: int | str = "auto",
        in_flight: int | str = "auto",
        share: str = "rows",
    ) -> None:
        self.lam, self.difference = checked_lam(lam, auto=True), checked_difference(difference)
        self.recipe = checked_instance("recipe", recipe, Recipe, remedy="Recipe(epochs=100).")
        self.seed, self.share = checked_seed(seed), checked_choice("share", share, ("rows", "draws"))
        self.vmap_chunk_size = checked_integer("vmap_chunk_size", vmap_chunk_size, at_least=1, words=("auto",))
        self.in_flight = checked_integer("in_flight", in_flight, at_least=1, words=("auto",))
        if in_flight != "auto" and share == "draws":
            raise OptionError('in_flight="auto" with share="draws"', received=repr(in_flight), remedy='share="rows".')
        if recipe.optimizer == "conjugate" and difference != "forward":
            raise OptionError(
                'difference="forward" with optimizer="conjugate"', received=repr(difference), remedy='"nesterov".'
            )
        if recipe.lr == "auto" and recipe.optimizer == "adam":
            raise OptionError(
                'a number for lr with optimizer="adam"', received='"auto"', remedy='optimizer="nesterov", or lr=1e-3.'
            )

    def __repr__(self) -> str:
        return f"FineTune(lam={self.lam}, difference={self.difference!r}, epochs={self.recipe.epochs})"

    def _solve(
        self, objective: Objective, perturbation: Perturbation, *, progress_bar: bool, checkpoint: Checkpoint
    ) -> Solution:
        objective = replace(objective, process_group=objective.process_group.sharing(self.share))
        _check_share(objective.process_group, perturbation, checkpoint)
        saved = checkpoint.load()
        lam, recipe = self._found(objective, perturbation, {} if saved is None else saved[1])
        mine, k = perturbation.part(objective.process_group.draws), len(perturbation.direction)
        size, device = self._size(objective, mine), objective.theta.device
        flights = Flights.resumed(len(mine.direction), size, checkpoint, saved, device)
        for which in flights.left():
            replicas, kept = self._replicas(objective, mine.part(which), lam), flights.keeping()
            if recipe.optimizer == "conjugate":
                landed = self._conjugate(replicas, recipe, kept, progress_bar=progress_bar)
            else:
                landed = self._stochastic(replicas, recipe, k, kept, progress_bar=progress_bar)
            flights.land(landed)
            lam = landed.lam
        landed, process_group = flights.together, objective.process_group
        report = SolverReport(
            repr(self), replicas=k, lam=landed.lam, lr=landed.rate, iterations=landed.steps, nonlinearity=landed.bend
        )
        energies = None if landed.energies is None else landed.energies.together(process_group, k)
        return Solution(process_group.together(landed.displacement, k), report, energies)

    def _conjugate(
        self, replicas: PerturbedCopies, recipe: Recipe, checkpoint: Checkpoint, *, progress_bar: bool
    ) -> Landed:
        """A flight along conjugate directions."""
        assert isinstance(recipe.epochs, int)
        most = recipe.epochs if self.recipe.epochs != "auto" else LONGEST * recipe.epochs
        chooses = self._chooses_lam(replicas.objective)
        refits = conjugate_refits(replicas, most, checkpoint, chooses=chooses, progress_bar=progress_bar)
        bend = _departure(replicas.objective, refits.at, refits.lam)
        return Landed(refits.at, refits.energies, refits.lam, bend, steps=refits.steps)

    def _stochastic(
        self, replicas: PerturbedCopies, recipe: Recipe, n_draws: int, checkpoint: Checkpoint, *, progress_bar: bool
    ) -> Landed:
        """A flight by stochastic gradients, of some of the replicas of all `n_draws`."""
        objective = replicas.objective
        descent = Descent(replicas, recipe, chooses=self._chooses_lam(objective))
        guarded = self.recipe.lr == "auto" and objective.data_term.centred
        stopping = None
        if guarded and self._chooses and descent.replicas.perturbation.start is not None:
            stopping = Stopping(descent, n_draws)
        arms = fit_weights(
            descent.replicas.start,
            descent.gradient,
            objective.batches,
            recipe=descent.recipe if stopping is None else stopping.longest,
            generator=torch.Generator().manual_seed(self.seed),
            epoch_callback=descent.watch if guarded else None,
            stop_criterion=None if stopping is None else stopping.enough,
            checkpoint=descent.keeping(checkpoint),
            progress_bar=progress_bar,
        )
        energies = None if stopping is None else stopping.energies
        displacement = descent.replicas.displacement(arms)
        lam = descent.replicas.lam
        return Landed(displacement, energies, lam, _departure(objective, displacement, lam), rate=descent.rate)

    def _size(self, objective: Objective, perturbation: Perturbation) -> int:
        """Replicas in flight."""
        k = len(perturbation.direction)
        if not isinstance(self.in_flight, str):
            return min(k, self.in_flight)
        arms = 2 if self.difference == "central" else 1
        alone = objective.process_group.size == 1
        return min(k, max(1, most_in_flight(perturbation.direction) // arms)) if alone else k

    @property
    def _chooses(self) -> bool:
        """Whether the number of epochs is ours to choose, and the rate does not depend on it."""
        return self.recipe.epochs == "auto" and self.recipe.schedule == "constant"

    def _found(self, objective: Objective, perturbation: Perturbation, found: dict[str, Any]) -> tuple[float, Recipe]:
        """λ and the recipe with its learning rate, as they were found, or looked for now."""
        lam = self.lam if "lam" not in found else float(found["lam"])
        lam = auto_lam(objective, perturbation) if isinstance(lam, str) else lam
        recipe = self.recipe.resolve(objective.batches.n_data)
        if self._few_rows(objective, perturbation, recipe):
            return lam, replace(recipe, optimizer="conjugate")
        if "lr" in found:
            return lam, replace(recipe, lr=float(found["lr"]))
        if recipe.lr == "auto":
            recipe = replace(recipe, lr=auto_learning_rate(objective, recipe, seed=self.seed))
        return lam, recipe

    def _chooses_lam(self, objective: Objective) -> bool:
        """Whether λ is ours to choose on the way; where processes share the draws it stays, alike in all."""
        return self.lam == "auto" and objective.data_term.centred and objective.process_group.draws == slice(None)

    def _few_rows(self, objective: Objective, perturbation: Perturbation, recipe: Recipe) -> bool:
        """Whether conjugate directions of all rows are asked for, or better. Errors: OptionError where impossible."""
        draws = objective.data_term.centred and perturbation.start is not None
        if recipe.optimizer == "conjugate" and not draws:
            raise OptionError(
                'posterior draws of a centred objective with optimizer="conjugate"',
                received=f"{type(perturbation).__name__}, centred: {objective.data_term.centred}",
                remedy='optimizer="nesterov", or PosteriorDraws().',
            )
        assert isinstance(recipe.epochs, int)
        few = self._chooses and recipe.lr == "auto" and self.difference == "forward" and recipe.epochs > _FEW_ROWS
        return recipe.optimizer == "conjugate" or (recipe.optimizer == "auto" and draws and few)

    def _replicas(self, objective: Objective, perturbation: Perturbation, lam: float) -> PerturbedCopies:
        at_once = self.vmap_chunk_size
        at_once = replicas_at_once(objective) if isinstance(at_once, str) else at_once
        return PerturbedCopies.of(objective, perturbation, lam, difference=self.difference, at_once=at_once)


def _departure(objective: Objective, displacement: Tensor, lam: float) -> float:
    """‖Δf − JΔθ‖/‖JΔθ‖ of a flight's end. Errors: LambdaTooLargeError."""
    with objective.network.pass_counter.phase("linearity"):
        bend = nonlinearity(objective, displacement, lam)
    if not bend <= _BENT:
        raise LambdaTooLargeError(
            f"refits that stay where the network responds linearly, ‖Δf − JΔθ‖ ≤ {_BENT} ‖JΔθ‖",
            received=f"a ratio of {bend:.3g} at lam={lam:g}",
            remedy=f'lam="auto", or a smaller lam such as {lam / 10:g}; or a smaller lr if the refit diverged.',
        )
    return bend


def _check_share(process_group: ProcessGroup, perturbation: Perturbation, checkpoint: Checkpoint) -> None:
    """Draws can be shared out where there are enough, and nothing is to be resumed. Errors: OptionError."""
    if process_group.size == 1 or process_group.shares == "rows":
        return
    if len(perturbation.direction) < process_group.size:
        raise OptionError(
            f"at least {process_group.size} draws for {process_group.size} processes",
            received=str(len(perturbation.direction)),
            remedy='more draws, or share="rows".',
        )
    if checkpoint.keeps:
        raise OptionError(
            "processes that share the rows, for a fit with a checkpoint",
            received='share="draws"',
            remedy='share="rows", or leave the checkpoint out and save() in the end.',
        )
