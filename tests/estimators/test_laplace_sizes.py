"""Exact linearized Laplace and its size: the inverse chosen, errors before allocation, precision of the floats."""

import pytest
import torch
from torch import nn

from estimators import Gaussian, LastLayerLaplace, LinearizedLaplace
from estimators.curvature.dense.cholesky import DensePrecision
from estimators.errors import TooLargeError


def fit(problem, **options):
    options = {"prior_precision": problem.delta, **options}
    return LinearizedLaplace(problem.model, problem.likelihood, **options).fit(problem.loader)


@pytest.mark.parametrize(
    ("width", "n", "curvature", "available", "choice"),
    [
        (60, 5, "ggn", 2**40, "dual"),
        (3, 40, "ggn", 2**40, "cholesky"),
        (60, 5, "hessian", 2**40, "cholesky"),
        (60, 5, "ggn", 2**16, "cg"),
        (60, 5, "hessian", 2**16, "cg"),
        (60, 5, "ggn", 2**19, "dual"),
    ],
)
def test_auto_takes_the_cheapest_inverse_that_fits(width, n, curvature, available, choice, make_problem, monkeypatch):
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))
    problem = make_problem(model=model, n=n, delta=90.0)
    monkeypatch.setattr("estimators.objective.objective.available_bytes", lambda _: available)
    fitted = fit(problem, curvature=curvature)
    assert fitted.inverse_ == choice
    assert bool((fitted.variance(problem.query) > 0).all())


@pytest.mark.parametrize(
    ("options", "build"),
    [
        ({"inverse": "cholesky"}, "dense_ggn"),
        ({"inverse": "cholesky", "curvature": "hessian"}, "dense_hessian"),
        ({"inverse": "dual"}, "ggn_rows"),
    ],
    ids=str,
)
def test_what_does_not_fit_into_memory_is_rejected_before_it_is_made(
    options, build, make_problem, monkeypatch, untouched
):
    problem = make_problem()
    made = []
    monkeypatch.setattr(f"estimators.curvature.builders.{build}", lambda *_: made.append(build))
    monkeypatch.setattr("estimators.runtime.memory.available_bytes", lambda _: 1000)
    with untouched(problem.model), pytest.raises(TooLargeError, match=r"of available memory.*Try: .*cg") as caught:
        fit(problem, **options)
    assert not made
    assert caught.value.bytes_available == 1000
    assert caught.value.bytes_needed > 43**2 * 8 / 2
    assert isinstance(caught.value, MemoryError)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_of_the_model_is_that_of_the_variance(dtype, make_problem):
    problem = make_problem()
    exact = fit(problem, inverse="cholesky").variance(problem.query)
    problem.model.to(dtype)
    problem.x, problem.query = problem.x.to(dtype), problem.query.to(dtype)
    for inverse in ("cholesky", "dual", "matrix_free_dual", "cg"):
        found = fit(problem, inverse=inverse).variance(problem.query)
        assert found.dtype == dtype
        assert torch.allclose(found.double(), exact, rtol=2e-3 if dtype == torch.float32 else 1e-8)


@pytest.mark.parametrize(("sigma", "delta"), [(0.05, 1e-2), (0.01, 1e-3)])
@pytest.mark.parametrize("route", ["cholesky", "dual", "matrix_free_dual", "cg", "last layer"])
def test_little_noise_and_a_weak_prior_cost_single_precision_no_digits(route, sigma, delta, make_problem):
    """The variance is then a remainder of 1e-6 of the prior's: what float32 algebra loses."""
    model = nn.Sequential(nn.Linear(10, 50), nn.Tanh(), nn.Linear(50, 1))
    problem = make_problem("regression", model=model, shape=(10,), n=30)
    problem.likelihood = Gaussian(sigma)

    def variance():
        if route == "last layer":
            estimator = LastLayerLaplace(model, problem.likelihood, prior_precision=delta)
            return estimator.fit(problem.loader).variance(problem.x)
        return fit(problem, inverse=route, prior_precision=delta).variance(problem.x)

    exact = variance()
    model.float()
    problem.x, problem.y = problem.x.float(), problem.y.float()
    found = variance()
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), exact, rtol=1e-3)


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_no_rows_are_made_for_products(curvature, make_problem):
    assert fit(make_problem(delta=90.0), curvature=curvature, inverse="cg").jacobian_backend_ == "products"


def test_an_empty_memory_of_rows_takes_small_pieces_to_the_same_result(make_problem, monkeypatch):
    problem = make_problem()
    whole = fit(problem).covariance(problem.query)
    monkeypatch.setattr("estimators.curvature.dense.ggn.rows_per_chunk", lambda _: 4)
    monkeypatch.setattr("estimators.curvature.base.rows_per_chunk", lambda _: 2)
    assert torch.allclose(fit(problem).covariance(problem.query), whole, rtol=1e-10)


@pytest.mark.parametrize(("smallest", "largest", "narrow"), [(1.0, 1e3, True), (1e-2, 1e3, True), (1e-4, 1e3, False)])
def test_queries_in_float32_are_solved_in_it_where_the_condition_allows(smallest, largest, narrow):
    generator = torch.Generator().manual_seed(2)
    basis = torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=torch.float64))[0]
    spectrum = torch.linspace(smallest, largest, 60, dtype=torch.float64)
    matrix = basis @ spectrum.diag() @ basis.T
    precision = DensePrecision(matrix, smallest=smallest)
    jacobian = torch.randn(4, 3, 60, generator=generator)
    found = precision.variance(jacobian)
    exact = (jacobian.double() @ torch.linalg.solve(matrix, jacobian.double().transpose(1, 2))).diagonal(dim1=1, dim2=2)
    assert (precision._float32 is not None) is narrow
    assert found.dtype == torch.float32
    assert float((found / exact - 1).abs().max()) < (2e-5 if narrow else 1e-6)  # round-off times a condition of 1e5
    precision.variance(jacobian.double())
    assert precision.whiten(jacobian.double()).dtype == torch.float64


def test_without_a_bound_of_the_smallest_eigenvalue_queries_are_solved_in_float64():
    precision = DensePrecision(torch.eye(3, dtype=torch.float64))
    assert precision.whiten(torch.ones(1, 1, 3)).dtype == torch.float64
