"""FineTune: minibatch refits at a finite λ, for networks of any size."""

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
from estimators.regvar.solvers.fine_tuning.sample_batches import (
    SampleBatches,
    SolvedBatch,
    default_chunk_size,
    max_concurrent_samples,
)
from estimators.regvar.solvers.fine_tuning.sgd import SGDRefits
from estimators.regvar.solvers.fine_tuning.stopping import MAX_EPOCHS_FACTOR, Stopping
from estimators.regvar.solvers.perturbed_copies import PerturbedCopies, checked_difference
from estimators.training.learning_rate import auto_learning_rate
from estimators.training.training import Recipe, fit_weights

__all__ = ["FineTune"]

DEFAULT_RECIPE = Recipe(
    epochs="auto", batch_size="auto", optimizer="auto", lr="auto", momentum=0.95, schedule="constant", average=0.3
)
_MAX_SGD_EPOCHS = 25  # above, conjugate gradients over all rows need fewer passes: docs/math.md, section 6
_MAX_NONLINEARITY = 0.5  # nonlinearity ratio at the end of a refit; saturating networks tend to 1


class FineTune(Solver):
    """Refits argmin L − λ r by SGD at a finite λ; all perturbed copies see the same batches.

    Needs only plain gradients of a plain loss. Posterior draws start at the prior draw, which is already the solution
    in directions without data. The displacement (θ − θ̂)/λ is stored instead of θ, so that float32 does not cancel.

    Source: the finite-difference form of McInerney & Kallus, AISTATS 2025, Theorem 4.1, on a centred objective
    (docs/math.md, sections 3 and 6).

    Args:
        lam: λ > 0, or "auto", which selects λ so that the gradients of a refit are nearest to those of the linear
            response. The error from nonlinearity decreases with λ, the error from round-off increases. For an objective
            that is not centred, "auto" is the largest λ with a nonlinearity ratio ‖Δf − JΔθ‖/‖JΔθ‖ ≤ 0.05 at the
            initial guess (0.005 in float64).
        difference: "forward" (one perturbed copy per draw, enough for a centred objective), "central" (two), or
            "control" (one, and one shared copy with λ = 0).
        recipe: epochs, batch size and optimizer. lr="auto" computes a stable rate from the curvature of some batches,
            and halves it after each epoch in which the objective increases. epochs="auto" with a constant rate stops
            posterior draws early if their A-norm error is small, and doubles the epochs if it is not.
            optimizer="auto" uses conjugate gradients over all rows, without a rate, for posterior draws with so few
            rows that SGD would take more than 25 epochs.
        seed: seed of the order of the batches, the same for all copies.
        vmap_chunk_size: perturbed copies in one vectorised call, or "auto" (1 for convolutions on a CPU, where grouped
            convolutions are slow; else as many as memory allows). It does not affect the fit: a saved fit or a
            checkpoint may be loaded with another value.
        max_concurrent: perturbed functions that are refitted concurrently, each with eight vectors of θ's size in
            memory. The others follow, and share no forward passes with them. "auto": as many as an eighth of the
            memory allows (all, in several processes).
        shard_by: what several processes (`fit(accelerator=...)`) divide: "rows" of every batch, with a sum over all
            processes per step, or "draws", each on all rows, with communication once an epoch. "draws" cannot resume
            from a checkpoint.

    Raises:
        OptionError: at construction or in `fit`, for options that are wrong or do not go together.
        LambdaTooLargeError: if the refit ends with a nonlinearity ratio above 0.5.
        ConvergenceError: if the objective increases at every learning rate.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from estimators import FineTune, PosteriorDraws, RegVar
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> loader = DataLoader(TensorDataset(x, x.sin()), batch_size=10)
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        >>> regvar = RegVar(model, "regression", regularizer=PosteriorDraws(32), solver=FineTune()).fit(loader)
        >>> regvar.variance(x[:3]).shape
        torch.Size([3, 1])
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
        max_concurrent: int | str = "auto",
        shard_by: str = "rows",
    ) -> None:
        self.lam, self.difference = checked_lam(lam, auto=True), checked_difference(difference)
        self.recipe = checked_instance("recipe", recipe, Recipe, remedy="Recipe(epochs=100).")
        self.seed, self.shard_by = checked_seed(seed), checked_choice("shard_by", shard_by, ("rows", "draws"))
        self.vmap_chunk_size = checked_integer("vmap_chunk_size", vmap_chunk_size, at_least=1, words=("auto",))
        self.max_concurrent = checked_integer("max_concurrent", max_concurrent, at_least=1, words=("auto",))
        if max_concurrent != "auto" and shard_by == "draws":
            raise OptionError(
                'max_concurrent="auto" with shard_by="draws"', received=repr(max_concurrent), remedy='shard_by="rows".'
            )
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
        objective = replace(objective, process_group=objective.process_group.shard_by(self.shard_by))
        _check_sharding(objective.process_group, perturbation, checkpoint)
        saved = checkpoint.load()
        lam, recipe = self._found(objective, perturbation, {} if saved is None else saved[1])
        mine, k = perturbation.select(objective.process_group.draws), len(perturbation.gradient)
        size, device = self._size(objective, mine), objective.theta.device
        sample_batches = SampleBatches.resumed(len(mine.gradient), size, checkpoint, saved, device)
        for which in sample_batches.remaining():
            copies, next_checkpoint = self._copies(objective, mine.select(which), lam), sample_batches.with_checkpoint()
            if recipe.optimizer == "conjugate":
                solved = self._conjugate(copies, recipe, next_checkpoint, progress_bar=progress_bar)
            else:
                solved = self._stochastic(copies, recipe, k, next_checkpoint, progress_bar=progress_bar)
            sample_batches.add(solved)
            lam = solved.lam
        solved, process_group = sample_batches.concatenated, objective.process_group
        report = SolverReport(
            repr(self),
            n_perturbations=k,
            lam=solved.lam,
            lr=solved.rate,
            iterations=solved.steps,
            nonlinearity=solved.nonlinearity,
        )
        a_norm_errors = None if solved.a_norm_errors is None else solved.a_norm_errors.gather(process_group, k)
        return Solution(process_group.all_gather(solved.displacement, k), report, a_norm_errors)

    def _conjugate(
        self, copies: PerturbedCopies, recipe: Recipe, checkpoint: Checkpoint, *, progress_bar: bool
    ) -> SolvedBatch:
        """Refit one sample batch by conjugate gradients."""
        assert isinstance(recipe.epochs, int)
        most = recipe.epochs if self.recipe.epochs != "auto" else MAX_EPOCHS_FACTOR * recipe.epochs
        selects_lam = self._selects_lam(copies.objective)
        refits = conjugate_refits(copies, most, checkpoint, selects_lam=selects_lam, progress_bar=progress_bar)
        ratio = _checked_nonlinearity(copies.objective, refits.at, refits.lam)
        return SolvedBatch(refits.at, refits.a_norm_errors, refits.lam, ratio, steps=refits.steps)

    def _stochastic(
        self, copies: PerturbedCopies, recipe: Recipe, n_draws: int, checkpoint: Checkpoint, *, progress_bar: bool
    ) -> SolvedBatch:
        """Refit one sample batch by SGD; there are `n_draws` samples in all."""
        objective = copies.objective
        refits = SGDRefits(copies, recipe, selects_lam=self._selects_lam(objective))
        guarded = self.recipe.lr == "auto" and objective.data_term.centred
        stopping = None
        if guarded and self._selects_epochs and refits.copies.perturbation.initial_guess is not None:
            stopping = Stopping(refits, n_draws)
        displacements = fit_weights(
            refits.copies.initial_guess,
            refits.gradient,
            objective.batches,
            recipe=refits.recipe if stopping is None else stopping.longest,
            generator=torch.Generator().manual_seed(self.seed),
            epoch_callback=refits.after_epoch if guarded else None,
            stop_criterion=None if stopping is None else stopping.enough,
            checkpoint=refits.with_checkpoint(checkpoint),
            progress_bar=progress_bar,
        )
        a_norm_errors = None if stopping is None else stopping.a_norm_errors
        displacement = refits.copies.difference_quotient(displacements)
        lam = refits.copies.lam
        return SolvedBatch(
            displacement, a_norm_errors, lam, _checked_nonlinearity(objective, displacement, lam), rate=refits.rate
        )

    def _size(self, objective: Objective, perturbation: Perturbation) -> int:
        """Return the number of samples that are refitted concurrently."""
        k = len(perturbation.gradient)
        if not isinstance(self.max_concurrent, str):
            return min(k, self.max_concurrent)
        copies_per_draw = 2 if self.difference == "central" else 1
        alone = objective.process_group.size == 1
        return min(k, max(1, max_concurrent_samples(perturbation.gradient) // copies_per_draw)) if alone else k

    @property
    def _selects_epochs(self) -> bool:
        """Whether the number of epochs is selected here: epochs="auto" with a rate that does not depend on it."""
        return self.recipe.epochs == "auto" and self.recipe.schedule == "constant"

    def _found(self, objective: Objective, perturbation: Perturbation, found: dict[str, Any]) -> tuple[float, Recipe]:
        """Return λ and the recipe with its learning rate, from a checkpoint or selected now."""
        lam = self.lam if "lam" not in found else float(found["lam"])
        lam = auto_lam(objective, perturbation) if isinstance(lam, str) else lam
        recipe = self.recipe.resolve(objective.batches.n_data)
        if self._uses_conjugate(objective, perturbation, recipe):
            return lam, replace(recipe, optimizer="conjugate")
        if "lr" in found:
            return lam, replace(recipe, lr=float(found["lr"]))
        if recipe.lr == "auto":
            recipe = replace(recipe, lr=auto_learning_rate(objective, recipe, seed=self.seed))
        return lam, recipe

    def _selects_lam(self, objective: Objective) -> bool:
        """Return whether λ may change during the refit; processes that share the draws keep one λ."""
        return self.lam == "auto" and objective.data_term.centred and objective.process_group.draws == slice(None)

    def _uses_conjugate(self, objective: Objective, perturbation: Perturbation, recipe: Recipe) -> bool:
        """Return whether to refit by conjugate gradients; raise OptionError if they are asked for but impossible."""
        draws = objective.data_term.centred and perturbation.initial_guess is not None
        if recipe.optimizer == "conjugate" and not draws:
            raise OptionError(
                'posterior draws of a centred objective with optimizer="conjugate"',
                received=f"{type(perturbation).__name__}, centred: {objective.data_term.centred}",
                remedy='optimizer="nesterov", or PosteriorDraws().',
            )
        assert isinstance(recipe.epochs, int)
        few = (
            self._selects_epochs
            and recipe.lr == "auto"
            and self.difference == "forward"
            and recipe.epochs > _MAX_SGD_EPOCHS
        )
        return recipe.optimizer == "conjugate" or (recipe.optimizer == "auto" and draws and few)

    def _copies(self, objective: Objective, perturbation: Perturbation, lam: float) -> PerturbedCopies:
        """Return the perturbed copies of a sample batch."""
        chunk_size = self.vmap_chunk_size
        chunk_size = default_chunk_size(objective) if isinstance(chunk_size, str) else chunk_size
        return PerturbedCopies.of(objective, perturbation, lam, difference=self.difference, chunk_size=chunk_size)


def _checked_nonlinearity(objective: Objective, displacement: Tensor, lam: float) -> float:
    """Return ‖Δf − JΔθ‖/‖JΔθ‖ at the end of a refit, or raise LambdaTooLargeError if it is large."""
    with objective.network.pass_counter.phase("nonlinearity"):
        ratio = nonlinearity(objective, displacement, lam)
    if not ratio <= _MAX_NONLINEARITY:
        raise LambdaTooLargeError(
            f"refits in the linear region of the network, ‖Δf − JΔθ‖ ≤ {_MAX_NONLINEARITY} ‖JΔθ‖",
            received=f"a ratio of {ratio:.3g} at lam={lam:g}",
            remedy=f'lam="auto", or a smaller lam such as {lam / 10:g}; or a smaller lr if the refit diverged.',
        )
    return ratio


def _check_sharding(process_group: ProcessGroup, perturbation: Perturbation, checkpoint: Checkpoint) -> None:
    """Raise OptionError if the processes cannot share the draws: too few draws, or a checkpoint."""
    if process_group.size == 1 or process_group.sharded == "rows":
        return
    if len(perturbation.gradient) < process_group.size:
        raise OptionError(
            f"at least {process_group.size} draws for {process_group.size} processes",
            received=str(len(perturbation.gradient)),
            remedy='more draws, or shard_by="rows".',
        )
    if checkpoint.keeps:
        raise OptionError(
            'shard_by="rows" for a fit with a checkpoint',
            received='shard_by="draws"',
            remedy='shard_by="rows", or leave the checkpoint out and save() in the end.',
        )
