"""Fine-tune: minibatch refits at a finite λ, the route for networks of any size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from estimators.checkpoint import Checkpoint
from estimators.errors import LambdaTooLargeError, OptionError
from estimators.objective import Objective
from estimators.regvar.penalty import Penalty
from estimators.regvar.solvers.base import Solution, Solver, SolverReport, checked_lam
from estimators.regvar.solvers.descent import Descent
from estimators.regvar.solvers.replicas import Replicas, checked_difference
from estimators.regvar.solvers.search import auto_lam, auto_learning_rate, nonlinearity, replicas_at_once
from estimators.regvar.solvers.stopping import Stopping
from estimators.team import Team
from estimators.training import Recipe, fit_weights

__all__ = ["FineTune"]

DEFAULT_RECIPE = Recipe(
    epochs="auto", batch_size="auto", optimizer="nesterov", lr="auto", momentum=0.95, schedule="constant", average=0.3
)
_BENT = 0.5  # saturating networks tend to 1


class FineTune(Solver):
    """argmin L − λ r by stochastic gradient descent, all replicas on the same batches, started at the first guess.

    Only plain gradients of a plain loss. For posterior draws the start is the prior draw, already the answer where the
    data say nothing. What is stored is the displacement (θ − θ̂)/λ.

    Args:
        lam: λ, or "auto": the largest whose start keeps the network linear, ‖Δf − JΔθ‖/‖JΔθ‖ ≤ 0.05 (0.005
            in float64).
        difference: "forward" (one arm, enough for a centred objective), "central" or "control".
        recipe: epochs, batches and optimizer. lr="auto" takes a stable rate from the curvature of some batches, and
            half of it from each epoch on in which the objective climbs. epochs="auto" with a constant rate stops
            posterior draws early where their energy error is small, and gives them twice the epochs where it is not.
        seed: orders the batches, alike in all arms.
        batch_replicas: replicas in one vectorised call, or "auto" (one at a time for convolutions on a CPU, where
            grouped convolutions are slow; else as many as memory allows).
        share: what several processes (`fit(accelerator=...)`) divide among them: the "rows" of every batch, at a sum
            over all at every step; or the "draws", each on all rows, which meet once an epoch, but cannot go on from a
            checkpoint.

    Errors: LambdaTooLargeError where the refit ends outside the linear region; ConvergenceError where it diverges.
    """

    refits = True

    def __init__(
        self,
        lam: float | str = "auto",
        difference: str = "forward",
        recipe: Recipe = DEFAULT_RECIPE,
        *,
        seed: int = 0,
        batch_replicas: int | str = "auto",
        share: str = "rows",
    ) -> None:
        self.lam, self.difference = checked_lam(lam, auto=True), checked_difference(difference)
        self.recipe, self.seed, self.batch_replicas, self.share = recipe, seed, batch_replicas, share
        if share not in ("rows", "draws"):
            raise OptionError('share "rows" or "draws"', received=repr(share), remedy='"rows".')
        if recipe.lr == "auto" and recipe.optimizer == "adam":
            raise OptionError(
                'a number for lr with optimizer="adam"', received='"auto"', remedy='optimizer="nesterov", or lr=1e-3.'
            )

    def __repr__(self) -> str:
        return f"FineTune(lam={self.lam}, difference={self.difference!r}, epochs={self.recipe.epochs})"

    def _solve(self, objective: Objective, penalty: Penalty, *, progress_bar: bool, checkpoint: Checkpoint) -> Solution:
        objective = replace(objective, team=objective.team.sharing(self.share))
        _check_share(objective.team, penalty, checkpoint)
        saved = checkpoint.load()
        descent = self._descent(objective, penalty, {} if saved is None else saved[1])
        guarded = self.recipe.lr == "auto" and objective.data_term.centred
        stopping = Stopping(descent, penalty) if guarded and self._chooses and penalty.start is not None else None
        arms = fit_weights(
            descent.replicas.start,
            descent.gradient,
            objective.batches,
            recipe=descent.recipe if stopping is None else stopping.longest,
            generator=torch.Generator().manual_seed(self.seed),
            watch=descent.watch if guarded else None,
            enough=None if stopping is None else stopping.enough,
            checkpoint=descent.keeping(checkpoint),
            progress_bar=progress_bar,
        )
        displacement = objective.team.together(descent.replicas.displacement(arms), len(penalty.direction))
        image = None if stopping is None else stopping.image
        return Solution(displacement, self._report(objective, displacement, descent), image=image)

    @property
    def _chooses(self) -> bool:
        """Whether the number of epochs is ours to choose, and the rate does not depend on it."""
        return self.recipe.epochs == "auto" and self.recipe.schedule == "constant"

    def _descent(self, objective: Objective, penalty: Penalty, found: dict[str, Any]) -> Descent:
        """Of this process's replicas, with λ and the learning rate that were found, or looked for now."""
        lam = self.lam if "lam" not in found else float(found["lam"])
        lam = auto_lam(objective, penalty) if isinstance(lam, str) else lam
        recipe = self.recipe.for_rows(objective.batches.n_data)
        if "lr" in found:
            recipe = replace(recipe, lr=float(found["lr"]))
        elif recipe.lr == "auto":
            recipe = replace(recipe, lr=auto_learning_rate(objective, recipe, seed=self.seed))
        at_once = self.batch_replicas
        at_once = replicas_at_once(objective) if isinstance(at_once, str) else at_once
        mine = penalty.part(objective.team.draws)
        return Descent(Replicas.of(objective, mine, lam, difference=self.difference, at_once=at_once), recipe)

    def _report(self, objective: Objective, displacement: Tensor, descent: Descent) -> SolverReport:
        lam = descent.replicas.lam
        with objective.network.ledger.part("linearity"):
            bend = nonlinearity(objective, displacement, lam)
        if not bend <= _BENT:
            raise LambdaTooLargeError(
                f"refits that stay where the network responds linearly, ‖Δf − JΔθ‖ ≤ {_BENT} ‖JΔθ‖",
                received=f"a ratio of {bend:.3g} at lam={lam:g}",
                remedy=f'lam="auto", or a smaller lam such as {lam / 10:g}; or a smaller lr if the refit diverged.',
            )
        return SolverReport(repr(self), replicas=len(displacement), lam=lam, lr=descent.rate, nonlinearity=bend)


def _check_share(team: Team, penalty: Penalty, checkpoint: Checkpoint) -> None:
    """Draws can be shared out where there are enough, and nothing is to be resumed. Errors: OptionError."""
    if team.size == 1 or team.shares == "rows":
        return
    if len(penalty.direction) < team.size:
        raise OptionError(
            f"at least {team.size} draws for {team.size} processes",
            received=str(len(penalty.direction)),
            remedy='more draws, or share="rows".',
        )
    if checkpoint.keeps:
        raise OptionError(
            "processes that share the rows, for a fit with a checkpoint",
            received='share="draws"',
            remedy='share="rows", or leave the checkpoint out and save() in the end.',
        )
