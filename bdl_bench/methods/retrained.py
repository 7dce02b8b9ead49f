"""Methods that train: other networks, one with dropout, or on from where the training ended."""

from __future__ import annotations

from typing import Any

from bdl_bench.methods.registry import Axis, Method, around, factors, preset, refuse_without_recipe
from bdl_bench.problem import Problem
from estimators import UncertaintyEstimator
from estimators.baselines import SWAG, DeepEnsemble, MCDropout
from estimators.baselines.dropout_layers import dropout_names

_MEMBERS, _RATE, _MASKS = 5, 0.1, 30


def _ensemble(problem: Problem, seed: int) -> UncertaintyEstimator:
    own = {"make_model": problem.make_model, "recipe": problem.recipe}
    return preset(DeepEnsemble, seeded=True, n_members=_MEMBERS, **own)(problem, seed)


def _dropout(problem: Problem, seed: int) -> UncertaintyEstimator:
    if dropout_names(problem.model):
        return preset(MCDropout, seeded=True, n_samples=_MASKS)(problem, seed)
    refuse_without_recipe("dropout", problem)
    own = {"make_model": problem.make_model, "recipe": problem.recipe}
    return preset(MCDropout, seeded=True, n_samples=_MASKS, rate=_RATE, **own)(problem, seed)


def _rates(problem: Problem, n: int) -> list[Any]:
    """About the preset's own; none where the network has layers of its own, whose rate is what it was trained with."""
    return [] if dropout_names(problem.model) else [_RATE * factor for factor in factors(n, decades=0.6)]


PRESETS = [
    Method(
        "ensemble",
        f"{_MEMBERS} networks trained from different initialisations, the given one among them",
        _ensemble,
        retrains=True,
    ),
    Method(
        "dropout",
        "MC dropout: the network's own layers, or one trained with dropout before its linear layers",
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
