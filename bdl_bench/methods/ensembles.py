"""Methods that train: other networks, one with dropout, or on from where the training ended."""

from __future__ import annotations

from typing import Any

from bdl_bench.methods.registry import Axis, Method, around, factors, preset, refuse_without_recipe
from bdl_bench.problem.problem import ENSEMBLE_SIZE, Problem
from estimators import UncertaintyEstimator
from estimators.baselines import SWAG, DeepEnsemble, MCDropout
from estimators.baselines.dropout_layers import dropout_names

_RATE, _MASKS = 0.1, 30


def _ensemble(problem: Problem, seed: int) -> UncertaintyEstimator:
    if problem.members is not None:
        return preset(DeepEnsemble, trained_members=problem.trained_members)(problem, seed)
    refuse_without_recipe("ensemble", problem)
    own = {"make_model": problem.make_model, "recipe": problem.recipe}
    return preset(DeepEnsemble, seeded=True, n_members=ENSEMBLE_SIZE, **own)(problem, seed)


def _dropout(problem: Problem, seed: int) -> UncertaintyEstimator:
    if problem.dropout_model is not None:  # nothing is trained, so that a prior of other names is not needed
        return MCDropout(problem.dropout_model, problem.likelihood, n_samples=_MASKS, seed=seed)
    if dropout_names(problem.model):
        return preset(MCDropout, seeded=True, n_samples=_MASKS)(problem, seed)
    refuse_without_recipe("dropout", problem)
    own = {"make_model": problem.make_model, "recipe": problem.recipe}
    return preset(MCDropout, seeded=True, n_samples=_MASKS, rate=_RATE, **own)(problem, seed)


def _rates(problem: Problem, n: int) -> list[Any]:
    """About the preset's own; none where the network has layers of its own, whose rate is what it was trained with."""
    own = problem.dropout_model is not None or dropout_names(problem.model)
    return [] if own else [_RATE * factor for factor in factors(n, decades=0.6)]


PRESETS = [
    Method(
        "ensemble",
        f"{ENSEMBLE_SIZE} networks trained from different initialisations, the given one among them; or your own",
        _ensemble,
    ),
    Method(
        "dropout",
        "MC dropout: the network's own layers, or one trained with dropout before its linear layers; or your own",
        _dropout,
        axis=Axis("rate", _rates),
    ),
    Method(
        "swag",
        "SWAG: a Gaussian through the iterates of SGD at a constant rate",
        preset(SWAG, seeded=True),
        axis=around("step", 1.0, decades=0.5),
    ),
]
