"""Every row that a fit sends through the network is counted, in each direction: compared with a meter inside of it."""

from collections import Counter

import pytest
import torch
from torch import nn

from estimators import (
    FineTune,
    LinearResponse,
    MeanAbsolute,
    NewtonRefit,
    ParameterProbes,
    Pointwise,
    PosteriorDraws,
    RegVar,
)
from estimators.errors import NotConvergedWarning
from estimators.runtime.pass_counter import PassCounter
from estimators.training import Recipe

WIDTH = 5
SEEN = Counter()


class Through(torch.autograd.Function):
    """The identity; counts the rows (WIDTH numbers each) that pass, whatever vmap, grad or jvp makes of it."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x, kind):
        SEEN[kind] += x.numel() / WIDTH
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):  # noqa: ARG004
        ctx.kind = inputs[1]

    @staticmethod
    def backward(ctx, slope):  # noqa: ARG004
        return Through.apply(slope, "backward"), None

    @staticmethod
    def jvp(ctx, tangent, _):
        return Through.apply(tangent, "backward" if ctx.kind == "backward" else "tangent")

    @staticmethod
    def vmap(info, in_dims, x, kind):  # noqa: ARG004
        return Through.apply(x, kind), in_dims[0]


class Meter(nn.Module):
    def forward(self, x):
        return Through.apply(x, "forward")


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh(), Meter(), nn.Linear(WIDTH, 3)).double().eval()


def rows():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(23, 4, generator=generator, dtype=torch.float64)
    return list(zip(x.split(9), torch.randint(0, 3, (23,), generator=generator).split(9), strict=True))


SHORT = Recipe(epochs=3, batch_size=7, optimizer="sgd", lr="auto", momentum=0.5)
FITS = {
    "draws": {"regularizer": PosteriorDraws(3), "solver": FineTune(recipe=SHORT)},
    "plain draws": {"regularizer": PosteriorDraws(3, rao_blackwell=None), "solver": FineTune(recipe=SHORT)},
    "one copy at a time": {"regularizer": PosteriorDraws(5), "solver": FineTune(recipe=SHORT, vmap_chunk_size=2)},
    "central": {"regularizer": PosteriorDraws(3), "solver": FineTune(1e-3, "central", recipe=SHORT)},
    "given lr": {"regularizer": PosteriorDraws(3), "solver": FineTune(1e-3, recipe=Recipe(epochs=2, lr=0.01))},
    "linear response": {"regularizer": PosteriorDraws(3, variance_estimate="monte_carlo"), "solver": LinearResponse()},
    "bounds": {"regularizer": PosteriorDraws(3, variance_estimate="bounds"), "solver": LinearResponse()},
    "newton": {"regularizer": PosteriorDraws(3), "solver": NewtonRefit()},
    "probes": {"regularizer": ParameterProbes(3), "solver": LinearResponse()},
    "hessian": {"regularizer": ParameterProbes(3), "solver": LinearResponse(), "curvature": "hessian"},
    "tilted": {"regularizer": ParameterProbes(3), "solver": FineTune(recipe=SHORT), "curvature": "hessian"},
    "mean absolute": {"regularizer": MeanAbsolute(), "solver": FineTune(recipe=SHORT)},
    "the paper's own": {
        "regularizer": MeanAbsolute(),
        "solver": FineTune(0.1, recipe=SHORT),
        "curvature": "hessian",
        "centred": False,
    },
}


def fitted(name):
    SEEN.clear()
    return RegVar(network(), "classification", prior_precision=40.0, **FITS[name]).fit(rows())


def vectorised_or_in_parts():
    """Every fit, with vectorised calls or in parts; both for each with the verification suite."""
    for i, name in enumerate(FITS):
        for in_parts in (False, True):
            marks = () if in_parts == bool(i % 2) else pytest.mark.verification
            yield pytest.param(name, in_parts, marks=marks, id=f"{in_parts}-{name}")


@pytest.mark.parametrize(("name", "in_parts"), list(vectorised_or_in_parts()))
@pytest.mark.filterwarnings("ignore::estimators.errors.NotConvergedWarning")
def test_the_pass_counter_has_every_row_of_a_fit_in_each_direction(name, in_parts, monkeypatch):
    if in_parts:
        monkeypatch.setattr("estimators.models.network._VECTORISED_ELEMENTS", 2 * 43)  # two vectors a call
    estimator = fitted(name)
    seen = dict(SEEN)
    parts = estimator.network_.pass_counter.phases.values()
    for kind in ("forward", "tangent", "backward"):
        assert sum(getattr(part, kind) for part in parts) == pytest.approx(seen.get(kind, 0)), kind
    price = (seen["forward"] + seen.get("tangent", 0) + 2 * seen["backward"]) / 3
    copies = estimator.fit_report_.solver.n_perturbations
    assert estimator.fit_report_.total_passes * 23 * copies == pytest.approx(price)


def test_the_parts_of_a_fit_cost_what_they_are():
    """Recipe: 3 epochs of 4 batches; K = 3 draws; N = 23 in batches of 9, 9 and 5."""
    report = fitted("draws").fit_report_
    shared = 1 / 3 / 3  # one forward for three draws
    expected = {
        "checks": 2 * shared,
        "relative gradient": 1 / 3,
        "noise": 2 / 3 + shared,
        "targets": 4 * shared,
        "solve": 4,  # with F at the start
        "search for lr": (7 + 7 + 7 + 2) / 23 * 8 * (1 + 2 / 3) / 3,  # eight products of one vector on each batch
        "A-norm error": 1 + 2 * shared,
    }
    assert {name: report.passes[name] for name in expected} == pytest.approx(expected)
    product, shares = 1, report.passes["Rao-Blackwellisation"] / shared  # and features, and finding the layer
    assert product + 4 * shared < shares * shared < product + 7 * shared
    assert report.passes.keys() - expected == {
        *("Rao-Blackwellisation", "search for lam", "nonlinearity", "variance estimate", "self-check")
    }
    solver = ("targets", "solve", "search for lr", "search for lam", "nonlinearity")
    assert report.solver.passes == pytest.approx(sum(report.passes[name] for name in solver))


def test_solves_at_query_count_their_own():
    loader, x = rows(), rows()[0][0][:2]
    estimator = RegVar(network(), "classification", regularizer=Pointwise(), solver=LinearResponse()).fit(loader)
    by_the_module = 1 + (3 * 3 + 2 + 2 + 1) / 23 / 3  # a gradient; of each batch three rows alone, and a quarter
    expected = {"checks": 2 / 3, "relative gradient": 1, "self-check": by_the_module}
    assert estimator.fit_report_.passes == pytest.approx(expected)
    estimator.variance(x)
    report = estimator.fit_report_.solver
    assert report.passes == pytest.approx(report.iterations * (1 + 2 / 3 / 6), rel=0.3)  # 6 right-hand sides


def test_an_interrupted_part_leaves_its_name():
    pass_counter = PassCounter()
    with pytest.raises(KeyboardInterrupt), pass_counter.phase("noise"), pass_counter.transformed(backward=1):
        raise KeyboardInterrupt
    pass_counter.forward(3)
    assert pass_counter.phases["checks"].forward == 3


def test_draws_that_have_not_converged_warn_and_longer_refits_do_not():
    options = {"prior_precision": 2.0, "regularizer": PosteriorDraws(32)}
    short = RegVar(network(), "classification", solver=FineTune(recipe=Recipe(1, 23, "sgd", 1e-3)), **options)
    with pytest.warns(NotConvergedWarning, match=r"per effective dimension.*more epochs.*LinearResponse"):
        short.fit(rows())
    assert short.a_norm_error_ > 0.5
    assert RegVar(network(), "classification", **options).fit(rows()).a_norm_error_ < 0.5
