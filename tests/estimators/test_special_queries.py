"""Values that only some rows have, in batches and queries of one shape: each of them is compared."""

import copy

import pytest
import torch
from torch import nn

from estimators import (
    LastLayerLaplace,
    LinearizedLaplace,
    LinearResponse,
    Pointwise,
    PosteriorDraws,
    RegVar,
)
from estimators.baselines import DeepEnsemble
from estimators.errors import EstimatorError, ModelChangedError, ModelError, OptionError, UnsupportedError

DELTA, LIMIT = 1.7, 5.0  # rows with a first feature beyond the limit are special
pytestmark = pytest.mark.filterwarnings("ignore::estimators.errors.DerivativeRouteWarning")


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class FrozenForSpecialRows(Plain):
    def forward(self, x):
        h = torch.tanh(self.a(x))
        with torch.no_grad():
            frozen = torch.tanh(self.a(x))
        return self.b(torch.where(x[:, :1] > LIMIT, frozen, h))


class ClosureForSpecialRows(Plain):
    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(4, 5)
        self.more = lambda x: self.extra(x)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x) + 0.1 * torch.relu(x[:, :1] - LIMIT) * self.more(x)))


class DetachedForSpecialRows(Plain):
    def forward(self, x):
        f = super().forward(x)
        return torch.where(x[:, :1] > LIMIT, f.detach(), f)


class CoupledSpecialRows(Plain):
    def forward(self, x):
        h = torch.tanh(self.a(x))
        special = (x[:, :1] > LIMIT).to(x.dtype)
        return self.b(h - special * (special * h).sum(0, keepdim=True) / special.sum().clamp_min(1))


def network(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().double().eval()


def rows(special=()):
    """Three batches of seven rows and one of two: the special ones are in the second and the third."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(23, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(23, 2, generator=generator, dtype=torch.float64)
    x[list(special), 0] = 9.0
    return list(zip(x.split(7), y.split(7), strict=True))


def jacobian(model, x):
    parameters, f = list(model.parameters()), model(x)
    slopes = [torch.autograd.grad(v, parameters, retain_graph=True, allow_unused=True) for v in f.flatten()]
    flat = [
        torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(one, parameters, strict=True)])
        for one in slopes
    ]
    return torch.stack(flat).view(*f.shape, -1)


def exact(model, loader, x):
    total = sum(torch.einsum("ncp,ncq->pq", j, j) for j in (jacobian(model, batch) for batch, _ in loader))
    total = total + DELTA * torch.eye(len(total), dtype=torch.float64)
    j = jacobian(model, x)
    return torch.einsum("mcp,pq,mcq->mc", j, torch.linalg.inv(total), j)


def laplace(model, **options):
    return LinearizedLaplace(model, "regression", prior_precision=DELTA, **options)


def draws(model, n):
    options = {"regularizer": PosteriorDraws(n), "solver": LinearResponse(tol=1e-10)}
    return RegVar(model, "regression", prior_precision=DELTA, **options)


FORMS = {
    "default": laplace,
    **{
        name: lambda model, name=name: laplace(model, inverse=name)
        for name in ("cholesky", "dual", "matrix_free_dual", "cg")
    },
    "pointwise": lambda model: RegVar(
        model, "regression", prior_precision=DELTA, regularizer=Pointwise(), solver=LinearResponse(tol=1e-12)
    ),
}
NETWORKS = [FrozenForSpecialRows, ClosureForSpecialRows, DetachedForSpecialRows]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("special", [(), (8, 10, 15, 17)], ids=["at queries only", "in later batches"])
def test_an_ordinary_query_does_not_hide_a_special_one(form, kind, special):
    model, loader = network(kind), rows(special)
    queries = loader[0][0] + 0.1
    unusual = queries.clone()
    unusual[2:5, 0] = 9.0
    if form == "matrix_free_dual" and kind is ClosureForSpecialRows and special:
        with pytest.raises(UnsupportedError):  # factors of layers do not show the closure
            [FORMS[form](model).fit(loader).variance(x) for x in (queries, unusual)]
        return
    estimator = FORMS[form](model).fit(loader)
    found = [estimator.variance(x) for x in (queries, unusual)]
    for x, variance in zip((queries, unusual), found, strict=True):
        torch.testing.assert_close(variance, exact(model, loader, x), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("form", ["default", "cholesky", "dual", "cg"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_loaded_fit_finds_the_routes_again(form, kind, tmp_path):
    model, loader = network(kind), rows((8, 10, 15, 17))
    fitted = FORMS[form](model).fit(loader)
    fitted.save(tmp_path / "fit.safetensors")
    loaded = FORMS[form](network(kind)).load(tmp_path / "fit.safetensors").attach_data(loader)
    for x in (loader[0][0], loader[1][0]):
        torch.testing.assert_close(loaded.variance(x), exact(model, loader, x), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("inverse", ["cholesky", "dual", "cg"])
def test_samples_of_special_rows_have_their_variance(inverse):
    model, loader = network(FrozenForSpecialRows), rows((8, 10, 15, 17))
    estimator = laplace(model, inverse=inverse).fit(loader)
    estimator.sample(loader[0][0], 2)
    found = estimator.sample(loader[1][0], 4000).var(0)
    expected = exact(model, loader, loader[1][0])
    assert ((found - expected).abs() <= 5 * expected * (2 / 4000) ** 0.5 + 1e-12).all()


def test_the_slope_of_the_last_layer_is_compared_at_every_query():
    model, loader = network(DetachedForSpecialRows), rows()
    estimator = LastLayerLaplace(model, "regression", prior_precision=DELTA).fit(loader)
    queries = loader[0][0].clone()
    estimator.variance(queries)
    queries[2:5, 0] = 9.0
    with pytest.raises(ModelError, match="differs from plain autograd"):
        estimator.variance(queries)


@pytest.mark.parametrize("make", [laplace, lambda model: draws(model, 4)])
def test_rows_that_depend_on_each_other_for_some_values_are_an_error(make):
    model, loader = network(CoupledSpecialRows), rows()
    estimator = make(model).fit(loader)
    queries = loader[0][0].clone()
    queries[:6, 0] = 9.0
    with pytest.raises(ModelError, match="do not depend on the other rows"):
        estimator.variance(queries)


def test_members_of_an_ensemble_have_their_own_weights_in_special_rows():
    model, member = network(ClosureForSpecialRows), network(ClosureForSpecialRows)
    with torch.no_grad():
        for p in member.parameters():
            p.mul_(1.5)
    loader = rows()
    estimator = DeepEnsemble(model, "regression", members=[member]).fit(loader)
    queries = loader[0][0].clone()
    queries[2:5, 0] = 9.0
    with torch.no_grad():
        expected = torch.stack([model(queries), member(queries)]).var(0, correction=1)
    torch.testing.assert_close(estimator.variance(queries), expected)


def test_a_module_with_a_hook_more_is_another_function():
    model, loader = network(Plain), rows()
    estimator = laplace(model).fit(loader)
    model.a.register_forward_hook(lambda _, __, output: 1.5 * output)
    with pytest.raises(ModelChangedError, match="fit again after changing hooks"):
        estimator.variance(loader[0][0])


def test_a_fit_is_not_loaded_around_another_activation(tmp_path):
    layers = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)
    model, loader = nn.Sequential(*layers).double().eval(), rows()
    laplace(model).fit(loader).save(tmp_path / "fit.safetensors")
    other = nn.Sequential(copy.deepcopy(layers[0]), nn.ReLU(), copy.deepcopy(layers[2])).eval()
    with pytest.raises(EstimatorError):
        laplace(other).load(tmp_path / "fit.safetensors")


@pytest.mark.parametrize(
    "of",
    [
        lambda f: float(f[0]),
        lambda f: {"a": f[0]},
        lambda f: f[f > 0],
        lambda _: torch.ones(2, dtype=torch.float64),
        lambda f: f.argmax(),
    ],
    ids=["number", "dict", "shape by row", "constant", "index"],
)
@pytest.mark.parametrize("form", ["cholesky", "cg", "last layer"])
def test_a_functional_without_a_derivative_is_a_typed_error_or_right(form, of):
    model, loader = network(Plain), rows()
    if form == "last layer":
        estimator = LastLayerLaplace(model, "regression", prior_precision=DELTA).fit(loader)
    else:
        estimator = laplace(model, inverse=form).fit(loader)
    try:
        found = estimator.variance(loader[0][0], of=of)
    except (OptionError, ModelError):
        return
    assert float(found.abs().max()) == 0.0  # a constant has no variance
