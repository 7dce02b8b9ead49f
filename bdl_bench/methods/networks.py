"""Methods of trained networks: one alone, ensembles, mixtures, dropout, SWAG, and ensembles that share most weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from bdl_bench.methods.registry import (
    BASELINE,
    PRIOR,
    Build,
    Method,
    OptionGrid,
    around,
    check_adapters,
    check_recipe,
    preset,
)
from bdl_bench.problem.problem import ENSEMBLE_SIZE, Problem
from estimators import LinearizedLaplace, UncertaintyEstimator
from estimators.baselines import (
    DDU,
    SNGP,
    SWAG,
    TFB,
    BatchEnsemble,
    DeepEnsemble,
    GradientNorm,
    LoRAEnsemble,
    MCDropout,
    Mixture,
    MultiHeadEnsemble,
    RetrainedMixture,
    TemperatureScaling,
)
from estimators.baselines.dropout_layers import dropout_names
from estimators.baselines.map import MAP
from estimators.errors import UnsupportedError
from estimators.estimator.cloning import clone
from estimators.tuning import shrinkage_of_few_rows

_RATE = 0.1
"""Dropout rate of networks that are trained here."""
_SMALLEST_RATE = 0.005
"""Smallest dropout rate that is tried, as in Gal and Ghahramani (2016)."""
_FEW_RATES = 3
"""Number of rates up to which none is above `_RATE`: more of them would leave the small ones out."""
_MASKS = 30
"""Dropout masks per prediction."""
_MEMBERS = 5
"""Sets of adapters, as many as a deep ensemble has networks."""
_RANK_ONE_MEMBERS = 4
"""Members of a BatchEnsemble, as in Wen et al. (2020)."""


def _temperature(problem: Problem, seed: int) -> UncertaintyEstimator:
    shrinkage = shrinkage_of_few_rows(problem.likelihood.kind)
    return preset(TemperatureScaling, validation=problem.validation, shrinkage=shrinkage)(problem, seed)


def _ensemble(problem: Problem, seed: int) -> UncertaintyEstimator:
    if problem.members is not None:
        return preset(DeepEnsemble, members=problem.trained_members)(problem, seed)
    check_recipe("ensemble", problem)
    training = {"make_model": problem.make_model, "recipe": problem.recipe}
    return preset(DeepEnsemble, seeded=True, n_members=ENSEMBLE_SIZE, **training)(problem, seed)


def _dropout(problem: Problem, seed: int) -> UncertaintyEstimator:
    if problem.dropout_model is not None:  # no prior precision: its names may be those of another network
        return MCDropout(problem.dropout_model, problem.likelihood, n_samples=_MASKS, seed=seed)
    if dropout_names(problem.model):
        return preset(MCDropout, seeded=True, n_samples=_MASKS)(problem, seed)
    check_recipe("dropout", problem)
    training = {"make_model": problem.make_model, "recipe": problem.recipe}
    return preset(MCDropout, seeded=True, n_samples=_MASKS, rate=_RATE, **training)(problem, seed)


def _rates(problem: Problem, n: int) -> list[Any]:
    """Return n dropout rates; none if the network has dropout layers, whose rate belongs to its training.

    They are log-spaced from the smallest rate of Gal and Ghahramani (2016) to that of the preset; of four and more, one
    is above it. Rates of a few per cent are too large for 50 hidden units (docs/reproduction.md).
    """
    if problem.dropout_model is not None or dropout_names(problem.model):
        return []
    above = [2 * _RATE] if n > _FEW_RATES else []
    return [float(rate) for rate in np.geomspace(_RATE, _SMALLEST_RATE, n - len(above))] + above


def _lora(problem: Problem, seed: int) -> UncertaintyEstimator:
    if problem.recipe is None:
        raise UnsupportedError(
            "a problem with a recipe, since lora-ensemble trains its own adapters",
            received="one without",
            remedy="pass recipe= to Problem.",
        )
    if all(p.requires_grad for p in problem.model.parameters()):
        raise UnsupportedError(
            "a network with frozen weights and adapters",
            received="one without frozen weights",
            remedy="the method ensemble.",
        )
    return preset(LoRAEnsemble, seeded=True, n_members=_MEMBERS, recipe=problem.recipe)(problem, seed)


def _sngp(problem: Problem, seed: int) -> UncertaintyEstimator:
    check_recipe("sngp", problem)
    if isinstance(problem.prior_precision, dict):
        raise UnsupportedError(
            "a problem with one prior_precision, since sngp trains a network with other parameters",
            received=f"prior_precision={problem.prior_precision!r}",
            remedy="a number.",
        )
    return preset(SNGP, seeded=True, make_model=problem.make_model, recipe=problem.recipe)(problem, seed)


def _batch_ensemble(problem: Problem, seed: int) -> UncertaintyEstimator:
    check_recipe("batch-ensemble", problem)
    training = {"make_model": problem.make_model, "recipe": problem.recipe}
    return preset(BatchEnsemble, seeded=True, n_members=_RANK_ONE_MEMBERS, **training)(problem, seed)


def _tfb(problem: Problem, seed: int) -> UncertaintyEstimator:
    check_adapters("tfb", problem)
    return preset(TFB, seeded=True)(problem, seed)


def _mixture(name: str, method: Build) -> Build:
    """Return a function that builds a mixture of a method at the networks of a deep ensemble."""

    def build(problem: Problem, seed: int) -> UncertaintyEstimator:
        first = method(problem, seed)
        if problem.trained_members is not None:
            options = [{"model": model, **_seeded(first, i)} for i, model in enumerate(problem.trained_members, 1)]
            return Mixture([first, *(clone(first, changed) for changed in options)])
        check_recipe(name, problem)
        training = {"make_model": problem.make_model, "recipe": problem.recipe}
        return RetrainedMixture(first, n_members=ENSEMBLE_SIZE, seed=seed, **training)  # type: ignore[arg-type]

    return build


def _seeded(first: UncertaintyEstimator, i: int) -> dict[str, int]:
    """Return the seed of component i, if the method has one."""
    return {"seed": first.seed + i} if isinstance(first, SWAG) else {}


def _retrained_prior(problem: Problem, n: int) -> list[Any]:
    """Return n prior precisions of the components; none if the networks are given, which makes another class."""
    return [] if problem.members is not None else PRIOR.values(problem, n)


PRESETS = [
    Method(BASELINE, "the trained network alone; its epistemic variance is zero", preset(MAP), default=True),
    Method(
        "temperature-scaling", "the trained network at the softmax temperature of the validation rows", _temperature
    ),
    Method("gradient-norm", "squared norm of the gradient of each output: RegVar with A = I", preset(GradientNorm)),
    Method("ddu", "the trained network, and the density of its features as an out-of-distribution score", preset(DDU)),
    Method(
        "ensemble",
        f"{ENSEMBLE_SIZE} networks trained from different initialisations, including the given one; or your own",
        _ensemble,
    ),
    Method(
        "dropout",
        "MC dropout: of the network's layers, or of a network trained with dropout before linear layers; or your own",
        _dropout,
        tuned_option=OptionGrid("rate", _rates),
    ),
    Method(
        "swag",
        "SWAG: a Gaussian fitted to the iterates of SGD at a constant learning rate",
        preset(SWAG, seeded=True),
        tuned_option=around("step", 1.0, decades=0.5),
    ),
    Method(
        "multihead-ensemble",
        "20 last layers on the trained features, each with its own prior sample and resampled training set",
        preset(MultiHeadEnsemble, seeded=True),
        tuned_option=PRIOR,
    ),
    Method(
        "multi-swag",
        f"MultiSWAG: a mixture of SWAG at {ENSEMBLE_SIZE} networks trained from different initialisations",
        _mixture("multi-swag", preset(SWAG, seeded=True)),
    ),
    Method(
        "laplace-mixture",
        f"a mixture of Laplace (K-FAC) at {ENSEMBLE_SIZE} networks trained from different initialisations",
        _mixture("laplace-mixture", preset(LinearizedLaplace, hessian_structure="kron")),
        tuned_option=OptionGrid("estimator.prior_precision", _retrained_prior),
    ),
    Method(
        "sngp",
        "SNGP: layers of bounded norm and a Gaussian process of random features as last layer, trained anew",
        _sngp,
    ),
    Method(
        "batch-ensemble",
        f"{_RANK_ONE_MEMBERS} networks that share their weights up to rank-one factors, trained together",
        _batch_ensemble,
    ),
    Method("lora-ensemble", f"{_MEMBERS} sets of LoRA adapters, each trained from its own initialisation", _lora),
    Method(
        "tfb",
        "training-free Bayesianization: LoRA adapters perturbed as far as the training loss allows",
        _tfb,
        tuned_option=around("tolerance", 0.01, decades=1),
    ),
]
