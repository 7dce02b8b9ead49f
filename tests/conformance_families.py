"""Rows of the conformance table: mixtures, variational inference, and samplers of the posterior over weights.

Chains are short and few epochs are trained: the kit asks nothing of their convergence. Batches are full where the order
of the rows must not matter.
"""

import copy
from functools import partial

import torch
from conformance_row import (
    CLOSED_FORMS,
    DIFFERING,
    ENDS_IN_LINEAR,
    GGN,
    GRADIENTS,
    INVARIANTS,
    MATRICES,
    NO_WEIGHTS,
    Row,
)

from estimators import LastLayerLaplace, LinearizedLaplace
from estimators.baselines import Mixture, RetrainedMixture
from estimators.sampling import SGHMC, SGLD, CyclicalSGHMC, MicrocanonicalLangevin
from estimators.training import Recipe
from estimators.variational import IVON, VBLL, MeanFieldVI

FULL_BATCHES = Recipe(epochs=4, batch_size=64, lr=0.03)
ITS_OWN_MEAN = {"predict-mean": "the mean of the members is not the output of the network"}
AVERAGED = {"link": "the probabilities are averaged over the components"}
NOTHING_EXACT = CLOSED_FORMS | INVARIANTS | NO_WEIGHTS
CHAIN = {"n_samples": 5, "thinning": 2, "n_chains": 2, "batch_size": 64}


def moved(model):
    """A network a small step away, as one of another seed."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            step = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter += 0.1 * step.to(parameter.device)
    return other


def fresh(model):
    """The same architecture, drawn anew."""
    made = copy.deepcopy(model)
    for module in made.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return made


def one_network_twice(model, likelihood, *, prior_precision):
    """Its moments are those of one."""
    options = {"prior_precision": prior_precision}
    return Mixture([LinearizedLaplace(model, likelihood, inverse=i, **options) for i in ("auto", "cholesky")])


def two_networks(model, likelihood, *, prior_precision):
    options = {"prior_precision": prior_precision}
    return Mixture([LinearizedLaplace(m, likelihood, **options) for m in (model, moved(model))], weights=[2, 1])


def retrained(model, likelihood, *, prior_precision):
    laplace = LastLayerLaplace(model, likelihood, prior_precision=prior_precision)
    return RetrainedMixture(laplace, make_model=partial(fresh, model), recipe=FULL_BATCHES, n_members=3)


FAMILIES = {
    "mixture, one network twice": Row(
        one_network_twice, GGN, NO_WEIGHTS - {"jacobians"}, DIFFERING | {"predict-epistemic", "link", "sample-moments"}
    ),
    "mixture": Row(two_networks, {"skip": {**ITS_OWN_MEAN, **AVERAGED}}, NOTHING_EXACT),
    "mixture, retrained": Row(
        retrained,
        {"skip": {**ITS_OWN_MEAN, **AVERAGED}},
        (NOTHING_EXACT | ENDS_IN_LINEAR),
        DIFFERING | {"reproducible", "training-row-order"},
    ),
    "mean-field VI": Row(
        partial(MeanFieldVI, recipe=FULL_BATCHES, n_samples=10), {"skip": ITS_OWN_MEAN}, NOTHING_EXACT
    ),
    "IVON": Row(
        partial(IVON, recipe=Recipe(epochs=4, batch_size=64, optimizer="sgd", lr=0.1), n_samples=10),
        {"skip": ITS_OWN_MEAN},
        NOTHING_EXACT,
        DIFFERING | {"reproducible", "training-row-order"},
    ),
    "VBLL": Row(
        partial(VBLL, tol=1e-5),
        {"skip": {"predict-mean": "the mean of the posterior is not the output of the network"}},
        CLOSED_FORMS | INVARIANTS | ENDS_IN_LINEAR | MATRICES | GRADIENTS | {"weight-moments", "jacobians"},
    ),
    "SGLD": Row(
        partial(SGLD, burn_in=4, **CHAIN),
        {"skip": ITS_OWN_MEAN},
        NOTHING_EXACT,
        DIFFERING | {"reproducible", "training-row-order"},
    ),
    "SGHMC": Row(partial(SGHMC, burn_in=4, **CHAIN), {"skip": ITS_OWN_MEAN}, NOTHING_EXACT),
    "cyclical SGHMC": Row(
        partial(CyclicalSGHMC, n_cycles=2, cycle_steps=10, n_samples=3, n_chains=2, batch_size=64),
        {"skip": ITS_OWN_MEAN},
        NOTHING_EXACT,
        DIFFERING | {"reproducible", "training-row-order"},
    ),
    "microcanonical Langevin": Row(
        partial(MicrocanonicalLangevin, warm_up=10, n_samples=5, thinning=2, n_chains=2),
        {"skip": ITS_OWN_MEAN},
        NOTHING_EXACT,
    ),
}
