"""The dual form with its rows in factors: equal to the one that keeps them whole, and to dense formulas."""

import pytest
import torch
from once_a_row import NETWORKS, Twice, wide
from torch import nn
from torch.nn import functional

from estimators import LinearizedLaplace
from estimators.curvature.forms import FactoredCurvature, JacobianCurvature
from estimators.curvature.layerwise import factored_dual
from estimators.curvature.layerwise import ggn as layered_ggn
from estimators.errors import TooLargeError, UnsupportedError


@pytest.fixture
def in_factors(monkeypatch):
    """Whether small networks, too, have their rows in factors."""

    def choose(chosen):
        monkeypatch.setattr(factored_dual, "_LEAST_PARAMETERS", 1 if chosen else 10**9)

    return choose


def fit(problem, **options):
    options = {"prior_precision": problem.delta, "inverse": "dual", **options}
    return LinearizedLaplace(problem.model, problem.likelihood, **options).fit(problem.loader)


def close(a, b):
    return torch.allclose(a, b, rtol=1e-9, atol=1e-12)


PROBLEMS = [("classification", name) for name in NETWORKS] + [("regression", None), ("binary", None)]


def posed(make_problem, kind, name):
    return make_problem(kind, model=NETWORKS[name]() if name else None)


@pytest.mark.parametrize(("kind", "name"), PROBLEMS)
def test_it_is_the_dense_formula(kind, name, in_factors, make_problem, by_hand):
    problem = posed(make_problem, kind, name)
    in_factors(chosen=True)
    fitted, exact = fit(problem), by_hand(problem).covariance(problem.query)
    assert isinstance(fitted.data_curvature_, FactoredCurvature)
    assert fitted.jacobian_backend_ == "layers"
    assert close(fitted.covariance(problem.query), exact)
    assert close(fitted.variance(problem.query), exact.diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("by_name", [False, True], ids=["a number", "by name"])
@pytest.mark.parametrize(("kind", "name"), PROBLEMS)
def test_products_with_its_rows_are_those_with_whole_ones(kind, name, by_name, in_factors, make_problem):
    problem = posed(make_problem, kind, name)
    first = next(name for name, p in problem.model.named_parameters() if p.requires_grad)
    delta = {first: 0.4, "*": 3.0} if by_name else 1.7
    in_factors(chosen=True)
    fitted = fit(problem, prior_precision=delta)
    in_factors(chosen=False)
    whole = fit(problem, prior_precision=delta)
    assert isinstance(whole.data_curvature_, JacobianCurvature)
    vectors = torch.randn(3, fitted.theta_.numel(), dtype=torch.float64)
    w = torch.randn(3, len(whole.data_curvature_.rows), dtype=torch.float64)
    assert close(fitted.precision_.rows_times(vectors), whole.precision_.rows_times(vectors))
    assert close(fitted.precision_.transposed_times(w), whole.precision_.transposed_times(w))
    assert close(fitted.precision_.solve(vectors), whole.precision_.solve(vectors))
    assert close(fitted.log_marginal_likelihood(), whole.log_marginal_likelihood())
    assert close(fitted.log_marginal_likelihood(0.3), whole.log_marginal_likelihood(0.3))
    assert close(fitted.sample(problem.query, 3), whole.sample(problem.query, 3))


def test_a_functional_that_reads_outputs_has_the_variance_of_whole_rows(in_factors, make_problem):
    problem = make_problem()
    in_factors(chosen=True)
    fitted = fit(problem)
    in_factors(chosen=False)
    margin = {"of": lambda f: f[0] * f[1]}
    assert close(fitted.variance(problem.query, **margin), fit(problem).variance(problem.query, **margin))


class Shared(nn.Module):
    """At a query of two rows of four numbers the layer is used twice, at one of one row once."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 9), nn.Linear(9, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x)).sum(1))


def test_queries_that_use_a_weight_at_several_places_have_whole_jacobians(in_factors, make_problem):
    problem = make_problem(model=Shared(), shape=(1, 4))
    in_factors(chosen=True)
    fitted = fit(problem)
    assert isinstance(fitted.data_curvature_, FactoredCurvature)
    in_factors(chosen=False)
    longer = torch.cat([problem.query, problem.query.flip(0)], dim=1)
    assert close(fitted.covariance(longer), fit(problem).covariance(longer))
    assert close(fitted.variance(longer), fit(problem).variance(longer))


def test_another_fit_at_the_same_weights_scales_it(in_factors, make_problem):
    problem = make_problem("regression")
    in_factors(chosen=True)
    fitted = fit(problem)
    vectors = torch.randn(3, fitted.theta_.numel(), dtype=torch.float64)
    moved = fitted.data_curvature_.rescaled(fitted.objective_, 2.25).rows
    assert close(moved.times(vectors), 1.5 * fitted.data_curvature_.rows.times(vectors))


def test_a_saved_fit_is_the_fit(in_factors, make_problem, tmp_path):
    problem = make_problem(model=NETWORKS["transposed"]())
    in_factors(chosen=True)
    fitted = fit(problem)
    fitted.save(tmp_path / "fit.safetensors")
    options = {"prior_precision": problem.delta, "inverse": "dual"}
    loaded = LinearizedLaplace(problem.model, problem.likelihood, **options)
    loaded.load(tmp_path / "fit.safetensors")
    assert torch.equal(loaded.covariance(problem.query), fitted.covariance(problem.query))
    assert torch.equal(loaded.precision_.log_det(), fitted.precision_.log_det())


def test_it_is_taken_where_every_weight_is_used_once_a_row(make_problem):
    assert isinstance(fit(make_problem(model=wide(3))).data_curvature_, FactoredCurvature)
    assert isinstance(fit(make_problem(model=Twice())).data_curvature_, JacobianCurvature)
    assert isinstance(fit(make_problem()).data_curvature_, JacobianCurvature)


def test_its_smaller_size_decides(make_problem, monkeypatch):
    problem = make_problem(model=wide(3))
    whole = 3 * 60 * fit(problem).theta_.numel() * 8
    monkeypatch.setattr("estimators.objective.objective.available_bytes", lambda _: whole // 2)
    assert fit(problem, inverse="auto").inverse_ == "dual"
    monkeypatch.setattr("estimators.runtime.memory.available_bytes", lambda _: 1000)
    with pytest.raises(TooLargeError, match=r"dual form"):
        fit(problem)


class Chunked(nn.Module):
    """A weight that enters as a linear layer, and in pieces."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 10), nn.Linear(10, 3)

    def forward(self, x):
        first, _ = self.inner.weight.chunk(2)
        return self.head(torch.tanh(self.inner(x))) + functional.linear(x, first)[:, :3]


class Stacked(nn.Module):
    """A weight that enters as a linear layer, and in a list."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 10), nn.Linear(10, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x))) * (1 + torch.stack([self.head.weight, self.head.weight]).mean())


class AsInput(nn.Module):
    """A weight that enters as a linear layer, and as the input of another."""

    def __init__(self):
        super().__init__()
        self.inner, self.other, self.head = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x))) + self.other(self.inner.weight).sin().sum(0)


class OfItself(nn.Module):
    """A layer applied to its own weight."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x)) + self.inner(self.inner.weight).sin().sum(0))


class Routed(nn.Module):
    """Rows go through one of two layers, by their numbers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 10), nn.Linear(4, 10), nn.Linear(10, 3)

    def forward(self, x):
        return self.head(torch.tanh(torch.stack([(self.a if row.sum() > 0 else self.b)(row) for row in x])))


@pytest.mark.parametrize("inverse", ["dual", "cholesky"])
@pytest.mark.parametrize("network", [Chunked, Stacked, AsInput, OfItself, Routed])
def test_a_weight_used_in_other_ways_has_whole_rows(network, inverse, in_factors, make_problem, by_hand, monkeypatch):
    problem = make_problem(model=network())
    monkeypatch.setattr(layered_ggn, "_LEAST_PARAMETERS", 1)
    in_factors(chosen=True)
    fitted = fit(problem, inverse=inverse)
    assert close(fitted.covariance(problem.query), by_hand(problem).covariance(problem.query))


@pytest.mark.parametrize("network", [Chunked, Stacked, AsInput, OfItself])
def test_a_diagonal_is_that_of_all_ways_in(network, make_problem, by_hand):
    problem = make_problem(model=network())
    options = {"prior_precision": problem.delta, "hessian_structure": "diag"}
    fitted = LinearizedLaplace(problem.model, problem.likelihood, **options).fit(problem.loader)
    diagonal = by_hand(problem).data_ggn().diagonal() + problem.delta
    jacobian = fitted.network_.jacobian(problem.query)
    assert close(fitted.variance(problem.query), (jacobian.square() / diagonal).sum(-1))


def test_queries_that_are_routed_have_whole_jacobians(in_factors, make_problem):
    problem = make_problem(model=Routed())
    alike = problem.x[problem.x.sum(1) > 0]  # all of them go through the first layer
    loader = [(alike, torch.arange(len(alike)) % 3)]

    def covariance(chosen):
        in_factors(chosen=chosen)
        options = {"prior_precision": 2.0, "inverse": "dual"}
        fitted = LinearizedLaplace(problem.model, problem.likelihood, **options).fit(loader)
        assert isinstance(fitted.data_curvature_, FactoredCurvature if chosen else JacobianCurvature)
        return fitted.covariance(problem.query)

    assert close(covariance(chosen=True), covariance(chosen=False))


def test_a_structure_of_routed_rows_is_rejected(make_problem):
    problem = make_problem(model=Routed())
    structured = LinearizedLaplace(problem.model, problem.likelihood, hessian_structure="kron")
    with pytest.raises(UnsupportedError, match=r"in the same way at every row"):
        structured.fit(problem.loader)


class Longer(nn.Module):
    """A second layer for rows that are longer, which are not the first ones."""

    def __init__(self):
        super().__init__()
        self.inner, self.more, self.head = nn.Linear(4, 10), nn.Linear(10, 10), nn.Linear(10, 3)

    def forward(self, x):
        z = torch.tanh(self.inner(x[:, :4]))
        return self.head(self.more(z) if x.shape[1] > 4 else z)


class Several(nn.Module):
    """As many outputs as the rows have numbers."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(1, 3)

    def forward(self, x):
        return torch.tanh(self.inner(x[:, :1])).repeat(1, x.shape[1])


class Summed(nn.Module):
    """A layer at as many places as the row has."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 300), nn.Linear(300, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x)).sum(1))


def test_auto_goes_on_where_later_batches_have_whole_rows_only(monkeypatch):
    model, generator = Summed().double(), torch.Generator().manual_seed(1)
    shapes = ((4, 1, 4), (60, 2, 4))
    loader = [(torch.randn(s, generator=generator, dtype=torch.float64), torch.arange(s[0]) % 3) for s in shapes]
    for module in ("objective.objective", "runtime.memory"):
        monkeypatch.setattr(f"estimators.{module}.available_bytes", lambda _: 5_000_000)
    fitted = LinearizedLaplace(model, "classification", prior_precision=2.0).fit(loader)
    assert fitted.inverse_ == "cg"


@pytest.mark.parametrize("widths", [(4, 5), (5, 4)])
@pytest.mark.parametrize(("network", "kind"), [(Longer, "classification"), (Several, "regression")])
def test_batches_of_several_kinds_have_whole_rows(network, kind, widths, in_factors):
    model, generator = network().double(), torch.Generator().manual_seed(1)
    rows = [torch.randn(6, width, generator=generator, dtype=torch.float64) for width in widths]
    targets = [torch.arange(6) % 3 if kind == "classification" else torch.zeros_like(model(x)).detach() for x in rows]
    options = {"prior_precision": 2.0, "inverse": "dual"}

    def covariance(chosen):
        in_factors(chosen=chosen)
        fitted = LinearizedLaplace(model, kind, **options).fit(list(zip(rows, targets, strict=True)))
        return torch.cat([fitted.covariance(x).flatten() for x in rows])

    assert close(covariance(chosen=True), covariance(chosen=False))


def test_a_layer_that_some_batches_do_without_has_its_block():
    model, generator = Longer().double(), torch.Generator().manual_seed(1)
    rows = [torch.randn(6, width, generator=generator, dtype=torch.float64) for width in (5, 4)]
    loader = [(x, torch.arange(6) % 3) for x in rows]
    options = {"prior_precision": 2.0}
    diag = LinearizedLaplace(model, "classification", hessian_structure="diag", **options).fit(loader)
    whole = LinearizedLaplace(model, "classification", inverse="cholesky", **options).fit(loader)
    diagonal = whole.data_curvature_.matrix.diagonal() + 2.0
    jacobian = whole.network_.jacobian(rows[0])
    assert close(diag.variance(rows[0]), (jacobian.square() / diagonal).sum(-1))
    shorter = whole.network_.jacobian(rows[1])
    assert close(diag.variance(rows[1]), (shorter.square() / diagonal).sum(-1))
    kron = LinearizedLaplace(model, "classification", hessian_structure="kron", **options).fit(loader)
    assert bool((kron.variance(rows[1]) > 0).all())


def test_queries_are_read_a_few_at_a_time(in_factors, make_problem, monkeypatch):
    problem = make_problem()
    in_factors(chosen=True)
    fitted = fit(problem)
    together, variance = fitted.covariance(problem.query), fitted.variance(problem.query)
    monkeypatch.setattr(factored_dual, "rows_per_chunk", lambda _: 2)
    assert torch.allclose(fitted.covariance(problem.query), together, rtol=1e-12)
    assert torch.allclose(fitted.variance(problem.query), variance, rtol=1e-12)
