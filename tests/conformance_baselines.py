"""Rows of the conformance table: the baselines, and the two networks of a custom training loop.

Those whose posterior is a number of networks have no Gaussian posterior over weights, and so no invariants of one. What
trains does so in full batches, in which the order of the rows is irrelevant, and for a few epochs: the kit checks no
optima.
"""

import copy
from dataclasses import replace
from functools import partial

import conformance_row as kit
import pytest
import torch
from lora_layers import with_adapters
from sampling_problems import LOOSE
from torch import nn

from estimators import ReferencePosterior
from estimators.baselines import (
    DDU,
    MAP,
    SNGP,
    SWAG,
    TFB,
    BatchEnsemble,
    DeepEnsemble,
    GaussianProcess,
    GradientNorm,
    LaplaceTorch,
    LoRAEnsemble,
    MCDropout,
    MultiHeadEnsemble,
    NTKGaussianProcess,
    SubnetworkLaplace,
    TemperatureScaling,
)
from estimators.integrations.manual_training import RegularizedPair
from estimators.testing import CASES
from estimators.testing.networks import WithDict
from estimators.training import Recipe

FULL_BATCHES = Recipe(epochs=4, batch_size=64, lr=0.03)
DESCENT = Recipe(epochs=6, batch_size=64, optimizer="sgd", lr="auto", schedule="constant")
MEMBERS = 10  # samples are members, drawn again: their covariance is 1 − 1/S of the variance, which is unbiased
AT_ANY_QUERY = replace(LOOSE, min_squares_ess=20)  # met at queries that the fit has not seen, too
ITS_OWN_MEAN = {"predict-mean": "the mean of the members is not the output of the network"}
ROWS_ALONE = {"joint-covariance"} | kit.MATRICES | kit.GRADIENTS
NOTHING_EXACT = kit.CLOSED_FORMS | kit.INVARIANTS | kit.NO_WEIGHTS


def fresh(model):
    """The same architecture, drawn anew."""
    made = copy.deepcopy(model)
    for module in made.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return made


def ensemble(model, likelihood, *, prior_precision):
    options = {"make_model": partial(fresh, model), "recipe": FULL_BATCHES, "n_members": MEMBERS}
    return DeepEnsemble(model, likelihood, prior_precision=prior_precision, **options)


def batch_ensemble(model, likelihood, *, prior_precision):
    options = {"make_model": partial(fresh, model), "recipe": FULL_BATCHES, "n_members": MEMBERS}
    return BatchEnsemble(model, likelihood, prior_precision=prior_precision, **options)


def trained_dropout(model, likelihood, *, prior_precision):
    options = {"rate": 0.3, "make_model": partial(fresh, model), "recipe": FULL_BATCHES, "n_samples": 40}
    return MCDropout(model, likelihood, prior_precision=prior_precision, **options)


def behind_dropout(model):
    return nn.Sequential(nn.Dropout(0.1), model)


def behind_identity(model):
    """The same function, with a first layer, which dropout spares."""
    first = nn.Linear(3, 3, bias=False, dtype=next(model.parameters()).dtype)
    nn.init.eye_(first.weight)
    return nn.Sequential(first, model)


def with_lora(model):
    """Adapters that do nothing yet, on every linear layer."""
    peft = pytest.importorskip("peft", reason="needs the extra: pip install bdl-bench[text]")
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    with torch.random.fork_rng(devices=[]):
        return peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=linear), model)


class HeldOut:
    """The kit's rows, as the network takes them, for a temperature."""

    def __init__(self, model, likelihood):
        linear = sum(isinstance(module, nn.Linear) for module in model.modules()) == 1
        names = ("softmax regression", "logistic regression") if linear else ("classification", "binary")
        parameter = next(model.parameters())
        self.case = replace(CASES[names[likelihood.kind == "binary"]], device=parameter.device)
        self.model, self.dtype = model, parameter.dtype

    def __iter__(self):
        x, y = self.case.inputs.to(self.dtype), self.case.targets
        if self.case.kind == "binary":
            y = y.to(self.dtype).reshape_as(self.model(x))
        inputs = {"features": x, "shift": torch.zeros_like(x)} if isinstance(self.model, WithDict) else x
        return iter([(inputs, y)])


def temperature(model, likelihood, *, prior_precision):
    validation = HeldOut(model, likelihood)
    return TemperatureScaling(model, likelihood, validation=validation, prior_precision=prior_precision)


def sngp(model, likelihood, *, prior_precision):
    options = {"make_model": partial(fresh, model), "recipe": FULL_BATCHES, "n_features": 16}
    return SNGP(model, likelihood, prior_precision=prior_precision, **options)


def two_networks(model, likelihood, *, prior_precision):
    """The second a small step away, which is what a training with the penalty would make."""
    regularized, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in regularized.parameters():
            step = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter += 1e-3 * step.to(parameter.device)
    return RegularizedPair(model, regularized, likelihood, lam=0.1, prior_precision=prior_precision)


BASELINES = {
    "map": kit.Row(MAP, {"skip": {"not-constant": "its variance is zero by definition"}}, NOTHING_EXACT | ROWS_ALONE),
    "temperature": kit.Row(
        temperature,
        {
            "skip": {
                "not-constant": "its variance is zero by definition",
                "predict-mean": "the mean is the output over T",
            }
        },
        NOTHING_EXACT | ROWS_ALONE | {"total-variance"},  # regression has no temperature
    ),
    "DDU": kit.Row(
        DDU,
        {"skip": {"not-constant": "its variance is zero by definition"}},
        NOTHING_EXACT | ROWS_ALONE | kit.ENDS_IN_LINEAR,
        has_score=True,
    ),
    "Gaussian process": kit.Row(
        GaussianProcess,
        {
            "skip": {
                "predict-mean": "the mean is that of the process",
                "constant-output": "the process has no weights of which an output could be independent",
            }
        },
        NOTHING_EXACT | {"dict-inputs"},
    ),
    "NTK-GP": kit.Row(
        NTKGaussianProcess,
        {
            "prior_of": "all",
            "skip": {
                "predict-mean": "the mean is that of the linearized network's posterior",
                "weight-moments": "samples of weights are around the posterior mean, not around the trained weights",
            },
        },
        kit.CLOSED_FORMS,
    ),
    "SNGP": kit.Row(
        sngp,
        {"skip": {"predict-mean": "the mean is that of the new network"}},
        NOTHING_EXACT | kit.ENDS_IN_LINEAR,
    ),
    "gradient norm": kit.Row(GradientNorm, {}, kit.CLOSED_FORMS | kit.INVARIANTS | {"jacobians"}),
    "subnetwork, all of it": kit.Row(SubnetworkLaplace, kit.GGN, by_default=kit.DIFFERING),
    "subnetwork": kit.Row(
        partial(SubnetworkLaplace, n_parameters=12),
        {"prior_of": "all", "skip": {"prior-limit": "the prior of the weights that are not chosen is left out"}},
        kit.CLOSED_FORMS,
    ),
    "ensemble": kit.Row(ensemble, {"skip": ITS_OWN_MEAN}, NOTHING_EXACT),
    "swag": kit.Row(partial(SWAG, recipe=DESCENT, n_samples=MEMBERS), {"skip": ITS_OWN_MEAN}, NOTHING_EXACT),
    "dropout": kit.Row(
        partial(MCDropout, n_samples=40), {"adapt": behind_dropout, "skip": ITS_OWN_MEAN}, NOTHING_EXACT
    ),
    "dropout, trained": kit.Row(
        trained_dropout,
        {
            "adapt": behind_identity,
            "skip": {
                **ITS_OWN_MEAN,
                "training-row-order": "dropout draws a mask for each place of a batch while it trains",
            },
        },
        NOTHING_EXACT | {"rejects-train-mode"},  # a model with a dropout layer is rejected before it can be tried
    ),
    "reference posterior": kit.Row(
        partial(ReferencePosterior, n_chains=8, n_draws=2000, starts="prior", criteria=AT_ANY_QUERY),
        {
            "noise": 0.3,
            "skip": {
                **ITS_OWN_MEAN,
                "training-row-order": "round-off in a sum changes later draws of a chain",
                "weight-samples": "samples are of the network, not of its linearization",
            },
        },
        NOTHING_EXACT - {"weight-samples"},
        frozenset({"supports-a-model", "shapes", "non-negative", "dict-inputs", "state-round-trip", "reproducible"})
        | {"model-untouched-by-fit", "random-state-untouched", "not-fitted", "constructor-stores"},
    ),
    "multi-head ensemble": kit.Row(
        partial(MultiHeadEnsemble, n_heads=MEMBERS),
        {"skip": {**ITS_OWN_MEAN, "training-row-order": "the bootstrap draws rows by their places"}},
        NOTHING_EXACT | kit.ENDS_IN_LINEAR,
    ),
    "lora ensemble": kit.Row(
        partial(LoRAEnsemble, recipe=FULL_BATCHES, n_members=MEMBERS),
        {"adapt": with_lora, "skip": ITS_OWN_MEAN},
        NOTHING_EXACT,
        kit.DIFFERING | {"reproducible", "training-row-order"},
    ),
    "tfb": kit.Row(
        partial(TFB, n_samples=MEMBERS),
        {"adapt": with_adapters, "skip": ITS_OWN_MEAN},
        NOTHING_EXACT,
        kit.DIFFERING | {"reproducible", "training-row-order"},
    ),
    "batch ensemble": kit.Row(
        batch_ensemble,
        {"skip": ITS_OWN_MEAN},
        NOTHING_EXACT,
        kit.DIFFERING | {"reproducible", "training-row-order"},
    ),
    "two networks": kit.Row(two_networks, {}, NOTHING_EXACT | kit.SAMPLES | kit.COVARIANCE | {"state-round-trip"}),
    "laplace-torch, full": kit.Row(
        partial(LaplaceTorch, hessian_structure="full"),
        {**kit.GGN, "tolerance": 1e-5},
        kit.SAMPLES
        | ROWS_ALONE
        | {"output-shape", "dict-inputs", "state-round-trip"}
        | {"closed-form-binary", "closed-form-prior-groups", "closed-form-noise-per-output"},
    ),
    "laplace-torch, kron": kit.Row(
        partial(LaplaceTorch, hessian_structure="kron"),
        {"prior_of": "all"},
        kit.CLOSED_FORMS | kit.SAMPLES | ROWS_ALONE | {"output-shape", "dict-inputs", "state-round-trip"},
        kit.DIFFERING,
    ),
    "laplace-torch, last layer": kit.Row(
        partial(LaplaceTorch, subset_of_weights="last_layer", hessian_structure="full"),
        {"exact": "last_layer", "tolerance": 1e-5},
        kit.SAMPLES
        | kit.ENDS_IN_LINEAR
        | ROWS_ALONE
        | {"dict-inputs", "state-round-trip"}
        | {"closed-form-binary", "closed-form-prior-groups", "closed-form-noise-per-output"},
        kit.DIFFERING,
    ),
}
