"""float32 on data as they are, with inputs from .001 to 1,000: the variance of the same weights in float64."""

import copy
from functools import cache
from itertools import product

import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_wine
from torch import nn

from estimators import (
    Gaussian,
    LastLayerLaplace,
    LinearizedLaplace,
    LinearResponse,
    Pointwise,
    PosteriorDraws,
    RegVar,
)
from estimators.curvature.krylov.block_cg import block_cg
from estimators.errors import IllConditionedError

DATA = {"wine": load_wine, "breast cancer": load_breast_cancer}
KINDS = {"classification": "classification", "regression": Gaussian(0.5)}
cases = pytest.mark.parametrize(("data", "kind"), [(data, kind) for data in DATA for kind in KINDS])
DELTAS = (0.01, 0.1, 1.0)
SELECTED = {("wine", "classification", 0.1), ("breast cancer", "regression", 1.0)}
cases_and_deltas = (
    pytest.mark.parametrize(  # by default the smallest δ, which is the hardest, and a cover of the others
        ("data", "kind", "delta"),
        [
            pytest.param(*case, marks=[] if case[2] == DELTAS[0] or case in SELECTED else [pytest.mark.verification])
            for case in product(DATA, KINDS, DELTAS)
        ],
    )
)
N = 100


@cache
def trained(data, kind):
    """A network trained in float32 on inputs that are not standardised, its rows, and queries."""
    found = DATA[data]()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    x, labels = torch.tensor(found.data, dtype=torch.float32)[order], torch.tensor(found.target)[order]
    y = labels if kind == "classification" else x[:, [0, 3]] / x[:, [0, 3]].std(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        outputs = int(labels.max()) + 1 if kind == "classification" else 2
        model = nn.Sequential(nn.Linear(x.shape[1], 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, outputs))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    loss = nn.CrossEntropyLoss() if kind == "classification" else nn.MSELoss()
    for _ in range(400):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    return model.eval(), x[:N], y[:N], x[N : N + 20]


@cache
def both(make, data, kind, delta):
    """The estimator fitted to the weights in float32, and to the same in float64; queries for the first. Only read."""
    model, x, y, queries = trained(data, kind)
    narrow = make(model, KINDS[kind], delta).fit(list(zip(x.split(30), y.split(30), strict=True)))
    wide_y = y if kind == "classification" else y.double()
    loader = list(zip(x.double().split(30), wide_y.split(30), strict=True))
    return narrow, make(copy.deepcopy(model).double(), KINDS[kind], delta).fit(loader), queries


def agree(narrow, wide, queries, rtol=1e-2):
    found, exact = narrow.variance(queries), wide.variance(queries.double())
    assert found.dtype == torch.float32
    return torch.allclose(found.double(), exact, rtol=rtol, atol=0)


def last_layer(structure):
    return lambda m, likelihood, delta: LastLayerLaplace(
        m, likelihood, prior_precision=delta, hessian_structure=structure
    )


def laplace(**options):
    return lambda m, likelihood, delta: LinearizedLaplace(m, likelihood, prior_precision=delta, **options)


CLOSED = {
    **{f"last layer, {structure}": last_layer(structure) for structure in ("full", "kron", "diag")},
    **{inverse: laplace(inverse=inverse) for inverse in ("cholesky", "dual", "matrix_free_dual", "cg", "auto")},
    **{s: laplace(hessian_structure=s) for s in ("kron", "ekfac", "diag", "lowrank")},
    "subset": laplace(subset_of_weights="last_layer", inverse="cholesky"),
}


def closed_forms():
    """Every pair of estimator, data and likelihood at the smallest δ, and the exact ones at a cover of the others."""
    for (i, estimator), case in product(enumerate(CLOSED), product(DATA, KINDS, DELTAS)):
        in_cover = (i + [*DATA].index(case[0]) + [*KINDS].index(case[1])) % 2 == 0
        selected = case in SELECTED and estimator in ("last layer, full", "auto", "cg")
        default = (case[2] == DELTAS[0] and in_cover) or selected
        marks = () if default else pytest.mark.verification
        yield pytest.param(estimator, *case, marks=marks, id="-".join(map(str, (estimator, *case))))


@pytest.mark.parametrize(("estimator", "data", "kind", "delta"), list(closed_forms()))
def test_laplace_is_that_of_float64(estimator, data, kind, delta):
    narrow, wide, queries = both(CLOSED[estimator], data, kind, delta)
    assert agree(narrow, wide, queries)
    assert torch.isfinite(narrow.covariance(queries)).all()
    if estimator not in ("cg",):
        evidence = narrow.log_marginal_likelihood(), wide.log_marginal_likelihood()
        assert torch.allclose(evidence[0].double(), evidence[1], rtol=1e-3)


def regvar(regularizer):
    return lambda m, likelihood, delta: RegVar(
        m, likelihood, prior_precision=delta, regularizer=regularizer, solver=LinearResponse()
    )


@cases_and_deltas
def test_pointwise_is_laplace_in_float64(data, kind, delta):
    narrow, _, queries = both(regvar(Pointwise()), data, kind, delta)
    _, wide, _ = both(CLOSED["cholesky"], data, kind, delta)
    assert agree(narrow, wide, queries)


def cases_of_draws():
    """Either kind of draws in turn; both for each with the verification suite."""
    for i, case in enumerate(product(DATA, KINDS, DELTAS)):
        for j, rao_blackwell in enumerate(["auto", None]):
            default = (case[2] == DELTAS[0] or case in SELECTED) and j == (i // len(DELTAS) + DELTAS.index(case[2])) % 2
            marks = () if default else pytest.mark.verification
            yield pytest.param(*case, rao_blackwell, marks=marks, id="-".join(map(str, (*case, rao_blackwell))))


@pytest.mark.parametrize(("data", "kind", "delta", "rao_blackwell"), list(cases_of_draws()))
def test_draws_are_those_of_float64_or_as_near_to_the_exact_variance(data, kind, delta, rao_blackwell):
    draws = PosteriorDraws(n_draws=200, rao_blackwell=rao_blackwell)
    narrow, wide, queries = both(regvar(draws), data, kind, delta)
    exact = both(CLOSED["cholesky"], data, kind, delta)[1].variance(queries.double())
    if narrow.refit_objective_.theta.dtype == torch.float64:  # the same draws
        assert agree(narrow, wide, queries)
    error = narrow.standard_error(queries).double() + 1e-2 * exact
    assert ((narrow.variance(queries).double() - exact).abs() <= 5 * error).all()
    assert narrow.a_norm_error_ >= 0


@cases
def test_bounds_hold_and_a_saved_fit_is_the_fit(data, kind, tmp_path):
    make = regvar(PosteriorDraws(n_draws=8, variance_estimate="bounds"))
    narrow, wide, queries = both(make, data, kind, 0.1)
    lower, upper = narrow.variance_bounds(queries)
    exact = both(CLOSED["cholesky"], data, kind, 0.1)[1].variance(queries.double())
    assert (lower.double() <= exact * (1 + 1e-3)).all()
    assert (exact * (1 - 1e-3) <= upper.double()).all()
    assert agree(narrow, wide, queries) or narrow.refit_objective_.theta.dtype == torch.float32
    narrow.save(tmp_path / "fit.safetensors")
    model = trained(data, kind)[0]
    loaded = make(model, KINDS[kind], 0.1).load(tmp_path / "fit.safetensors")
    assert torch.equal(loaded.variance(queries), narrow.variance(queries))
    assert loaded.sample(queries, 3).dtype == torch.float32


@cases
def test_samples_of_the_last_layer_spread_as_their_variance(data, kind):
    narrow, _, queries = both(CLOSED["last layer, kron"], data, kind, 0.1)
    spread = narrow.sample(queries, 4000).var(0)
    assert torch.allclose(spread, narrow.variance(queries), rtol=0.2)


def test_an_exact_hessian_is_summed_in_float64():
    for data in DATA:
        narrow, wide, queries = both(laplace(curvature="hessian", inverse="cholesky"), data, "classification", 1e4)
        assert agree(narrow, wide, queries, rtol=1e-3)


def test_products_that_leave_no_digits_are_rejected_by_name():
    spectrum = torch.logspace(0, 7, 20)
    right = torch.randn(2, 20)
    with pytest.raises(IllConditionedError, match=r"standardise the inputs .*model\.double\(\)"):
        block_cg(lambda v: v * spectrum, right, smallest=1.0)
    with pytest.raises(IllConditionedError):
        block_cg(lambda v: v * spectrum, right, smallest=0.0)
    wide = block_cg(lambda v: v * spectrum.double(), right.double(), smallest=1.0)
    assert torch.allclose(wide.solution, right / spectrum.double())
    block_cg(lambda v: v * spectrum.clamp_max(1e3), right, smallest=1.0, tol=1e-4)


@pytest.mark.parametrize("inverse", ["cg", "cholesky"])
def test_standardised_inputs_stay_in_float32(inverse):
    model, x, y, queries = trained("wine", "classification")
    x = (x - x.mean(0)) / x.std(0)
    fitted = LinearizedLaplace(model, "classification", inverse=inverse).fit([(x, y)])
    assert fitted.variance(queries).dtype == fitted.theta_.dtype == torch.float32


def test_where_float64_is_missing_the_remedy_is_named(monkeypatch):
    model, x, y, queries = trained("breast cancer", "regression")
    monkeypatch.setattr("estimators.regvar.estimator.to_float64", lambda objective: objective)
    estimator = regvar(Pointwise())(model, Gaussian(0.5), 0.1).fit([(x, y)])
    with pytest.raises(IllConditionedError, match="standardise the inputs"):
        estimator.variance(queries)
