"""One estimator fitted twice, on the CPU and on the simulated device, and all that both are asked for."""

from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from conformance_baselines import BASELINES, DESCENT, FULL_BATCHES, behind_identity, fresh, with_lora
from conformance_families import FAMILIES
from conformance_posteriors import POSTERIORS
from conformance_row import Row
from simulated_device import DEVICE

from estimators import (
    FineTune,
    LinearResponse,
    ParameterProbes,
    PosteriorDraws,
    ReferencePosterior,
    RegVar,
    SignedProbes,
)
from estimators.baselines import SWAG, DeepEnsemble, LoRAEnsemble, MCDropout, MultiHeadEnsemble
from estimators.sampling import ConvergenceCriteria
from estimators.testing import CASES
from estimators.testing.estimator_under_test import UNSUPPORTED_ERRORS
from estimators.training import Recipe

__all__ = ["DIRECT", "QUESTIONS", "ROWS", "Fits", "answers", "assert_same", "fits", "made"]

SHORT = replace(FULL_BATCHES, epochs=2)
SGD = Recipe(epochs=2, batch_size=10, optimizer="nesterov", lr="auto", momentum=0.9, average=0.3)

ANY_CHAINS = ConvergenceCriteria(1000, 0, 0, 1, 1, 0, 1, 1000)


def ensemble(model, likelihood, **options):
    return DeepEnsemble(model, likelihood, make_model=partial(fresh, model), recipe=SHORT, n_members=2, **options)


def trained_dropout(model, likelihood, **options):
    make_model = partial(fresh, model)
    return MCDropout(model, likelihood, rate=0.3, make_model=make_model, recipe=SHORT, n_samples=4, **options)


SHORTER = {
    "draws": Row(partial(RegVar, regularizer=PosteriorDraws(4), solver=LinearResponse())),
    "draws, no Rao-Blackwellisation": Row(
        partial(RegVar, regularizer=PosteriorDraws(4, rao_blackwell=None), solver=LinearResponse())
    ),
    "draws, bounds": Row(
        partial(RegVar, regularizer=PosteriorDraws(4, variance_estimate="bounds"), solver=LinearResponse())
    ),
    "draws, fine tune": Row(partial(RegVar, regularizer=PosteriorDraws(3), solver=FineTune(recipe=SGD))),
    "parameter probes": Row(partial(RegVar, regularizer=ParameterProbes(n_probes=5), solver=LinearResponse())),
    "signed probes": Row(partial(RegVar, regularizer=SignedProbes(n_probes=5), solver=LinearResponse())),
    "ensemble": Row(ensemble),
    "swag": Row(partial(SWAG, recipe=DESCENT, n_samples=4)),
    "dropout, trained": Row(trained_dropout, {"adapt": behind_identity}),
    "reference posterior": Row(
        partial(ReferencePosterior, n_chains=4, n_draws=128, starts="prior", criteria=ANY_CHAINS)
    ),
    "multi-head ensemble": Row(partial(MultiHeadEnsemble, n_heads=3)),
    "lora ensemble": Row(partial(LoRAEnsemble, recipe=SHORT, n_members=2), {"adapt": with_lora}),
}
"""Rows of the conformance table with few draws, members and epochs: nothing statistical is looked at here."""
ROWS = {**POSTERIORS, **BASELINES, **FAMILIES, **SHORTER}


@dataclass(frozen=True)
class Fits:
    """An estimator on the CPU and one on the device, with the case of each."""

    here: object
    there: object
    case: object

    @property
    def case_there(self):
        return replace(self.case, device=DEVICE)


def made(row, case):
    """An estimator of a row on the device of a case, not fitted."""
    adapt = row.options.get("adapt", lambda model: model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = adapt(case.module()).to(case.device).eval()
    return row.make(model, case.likelihood, prior_precision=case.delta)


@cache
def fits(name, case_name="classification"):
    """Both fits of a row: only to be queried."""
    case = CASES[case_name]
    here, there = (made(ROWS[name], each).fit(each.loader) for each in (case, replace(case, device=DEVICE)))
    return Fits(here, there, case)


def margin_and_norm(f):
    return torch.stack([f[0] - f[1], f.square().sum()])


DIRECT = ("covariance", "functional")
QUESTIONS = (*DIRECT, "samples", "probit", "mc")
"""What `answers` asks besides the variance; those after `DIRECT` are made of a variance or a covariance."""


def answers(estimator, x, questions=QUESTIONS):
    """Every tensor that a fit gives at queries, by name; without those that it does not have."""
    found = {"theta": estimator.theta_, "variance": estimator.variance(x)}
    asked = {
        "covariance": lambda: estimator.covariance(x),
        "samples": lambda: estimator.sample(x, 3, seed=4),
        "functional": lambda: estimator.variance(x, of=margin_and_norm),
        "probit": lambda: estimator.predict(x),
        "mc": lambda: estimator.predict(x, link_approx="mc", n_samples=5),
    }
    for name in questions:
        try:
            answer = asked[name]()
        except UNSUPPORTED_ERRORS:
            continue
        parts = {name: answer} if isinstance(answer, torch.Tensor) else vars(answer)
        found |= {f"{name} {part}": v for part, v in parts.items() if isinstance(v, torch.Tensor)}
    return found


def assert_same(here, there, *, device=DEVICE, rtol=1e-10):
    """Tensors by name: the second on the device, with the numbers of the first."""
    assert here.keys() == there.keys()
    for name, expected in here.items():
        received = there[name]
        assert received.device == device, name
        assert received.dtype == expected.dtype, name
        assert torch.allclose(received.cpu(), expected.cpu(), rtol=rtol, atol=rtol * float(expected.abs().max())), name
