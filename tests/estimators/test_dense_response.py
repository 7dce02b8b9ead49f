"""The default RegVar of networks of a few thousand parameters: a Cholesky factor of A, and the exact variance."""

import copy

import pytest
import torch
from torch import nn

from estimators import Gaussian, LinearizedLaplace, PosteriorDraws, RegVar
from estimators.errors import OptionError
from estimators.regvar.solvers import to_tolerance
from estimators.regvar.solvers.dense_response import DenseResponse

DELTA, SIGMA, N, WIDTH, C = 1.7, 0.6, 2900, 48, 2


def network(n_outputs=C, dtype=torch.float64, width=WIDTH):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(),
                              nn.Linear(width, n_outputs)).double()  # fmt: skip
        return model.to(dtype)


def rows(n_outputs=C, dtype=torch.float64, n=N):
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(n, size, generator=generator, dtype=torch.float64).to(dtype) for size in (3, n_outputs))
    return list(zip(x.split(800), y.split(800), strict=True))


QUERIES = 2 * torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def fitted(dtype=torch.float64, **options):
    return RegVar(network(dtype=dtype), Gaussian(SIGMA), prior_precision=DELTA, **options).fit(rows(dtype=dtype))


@pytest.fixture(scope="module")
def regvar():
    return fitted()


@pytest.fixture(scope="module")
def joint():
    """J A⁻¹ Jᵀ between all outputs at the queries, a second time: A = Σ JᵀJ/σ² + δ, J by `torch.func`."""
    model = network()
    theta = {name: value.detach() for name, value in model.named_parameters()}

    def outputs(theta, row):
        return torch.func.functional_call(model, theta, (row[None],))[0]

    def jacobian(x):
        by_name = torch.func.vmap(torch.func.jacrev(outputs), in_dims=(None, 0))(theta, x)
        return torch.cat([entries.flatten(2) for entries in by_name.values()], 2).flatten(0, 1)

    j, at_queries = torch.cat([jacobian(x) for x, _ in rows()]), jacobian(QUERIES)
    a = j.T @ j / SIGMA**2 + DELTA * torch.eye(j.shape[1], dtype=torch.float64)
    return at_queries @ torch.linalg.solve(a, at_queries.T)


def test_the_variance_and_every_covariance_are_exact(regvar, joint):
    expected = joint.view(5, C, 5, C)
    row = torch.arange(5)
    torch.testing.assert_close(regvar.covariance(QUERIES), expected[row, :, row], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(regvar.variance(QUERIES), joint.diagonal().view(5, C), rtol=1e-8, atol=0)
    torch.testing.assert_close(regvar.joint_covariance(QUERIES), expected, rtol=1e-8, atol=1e-12)
    of = regvar.variance(QUERIES, of=lambda f: f[0] - 3 * f[1])
    g = torch.tensor([1.0, -3.0], dtype=torch.float64)
    torch.testing.assert_close(of.flatten(), torch.einsum("c,mcd,d->m", g, expected[row, :, row], g), rtol=1e-8, atol=0)
    lower, upper = regvar.variance_bounds(QUERIES)
    assert torch.equal(lower, upper)
    assert torch.equal(lower, regvar.variance(QUERIES))


def test_the_draws_solve_their_system_as_products_with_a_say(regvar):
    assert regvar.a_norm_error_ < 1e-12
    u, objective = regvar.variance_estimate_.displacement, regvar.refit_objective_
    xi = PosteriorDraws().build_problem(objective)[0].gradient
    torch.testing.assert_close(objective.product(u), xi, rtol=0, atol=1e-8 * float(xi.abs().max()))
    assert regvar.fit_report_.solver.residual < 1e-10
    assert regvar.relative_error_ < 1e-6
    assert "Cholesky" in regvar.solver_
    assert regvar.sample(QUERIES, 16).shape == (16, 5, C)
    many = fitted(regularizer=PosteriorDraws(100))
    draws = many.sample(QUERIES, 100) - network()(QUERIES).detach()
    error = draws.square().mean(0) / regvar.variance(QUERIES) - 1
    assert float(error.abs().max()) < 5 * (2 / 100) ** 0.5


def test_a_saved_a_refined_and_a_cloned_fit_are_exact_too(regvar, tmp_path):
    regvar.save(tmp_path / "fit.safetensors")
    loaded = RegVar(network(), Gaussian(SIGMA), prior_precision=DELTA).load(tmp_path / "fit.safetensors")
    assert torch.equal(loaded.variance(QUERIES), regvar.variance(QUERIES))
    assert torch.equal(regvar.refine(QUERIES).variance(QUERIES), regvar.variance(QUERIES))
    other = regvar.clone_with(prior_precision=9.0)
    exact = LinearizedLaplace(network(), Gaussian(SIGMA), prior_precision=9.0).fit(rows())
    torch.testing.assert_close(other.variance(QUERIES), exact.variance(QUERIES), rtol=1e-8, atol=0)


def test_the_variance_is_differentiable_in_the_inputs(regvar):
    x = QUERIES[:2].clone().requires_grad_()
    (slope,) = torch.autograd.grad(regvar.variance(x).sum(), x)
    step, direction = 1e-5, torch.tensor([[0.3, -1.0, 0.5], [1.0, 0.2, -0.4]], dtype=torch.float64)
    moved = [regvar.variance(QUERIES[:2] + sign * step * direction).sum() for sign in (1, -1)]
    torch.testing.assert_close((slope * direction).sum(), (moved[0] - moved[1]) / (2 * step), rtol=1e-5, atol=0)


def test_a_float32_network_has_the_variance_of_float64(regvar):
    found = fitted(torch.float32)
    assert "Cholesky" in found.solver_
    torch.testing.assert_close(found.variance(QUERIES.float()).double(), regvar.variance(QUERIES), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("likelihood", "n_outputs", "options"),
    [
        ("classification", 2, {}),
        ("binary", 1, {}),
        ("regression", 2, {"prior_precision": {"0.*": 0.4, "*": 3.0}}),
        ("regression", 2, {"subset_of_weights": ["2.*", "4.*"], "prior_mean": 0.3}),
        ("regression", 1, {"val_loader": True}),
    ],
    ids=["classes", "binary", "two priors", "subset", "calibrated"],
)
def test_every_likelihood_and_prior_has_the_variance_of_exact_laplace(likelihood, n_outputs, options):
    options = {"prior_precision": DELTA, **options}
    calibrated = options.pop("val_loader", False)
    loader = rows(n_outputs)
    if likelihood != "regression":
        loader = [(x, y.argmax(1) if likelihood == "classification" else (y > 0).double()) for x, y in loader]
    fits = [
        kind(network(n_outputs), likelihood, **options).fit(loader, val_loader=loader[:1] if calibrated else None)
        for kind in (RegVar, LinearizedLaplace)
    ]
    assert "Cholesky" in fits[0].solver_
    torch.testing.assert_close(fits[0].variance(QUERIES), fits[1].variance(QUERIES), rtol=1e-8, atol=0)
    found, expected = (fit.predict(QUERIES) for fit in fits)
    torch.testing.assert_close(found.std, expected.std, rtol=1e-6, atol=0)


def test_a_network_whose_condition_leaves_float32_no_digits_is_solved_in_float64():
    model = network(dtype=torch.float32)
    options = {"likelihood": Gaussian(0.01), "prior_precision": 1e-4}
    found = RegVar(model, **options).fit(rows(dtype=torch.float32))
    wide = RegVar(copy.deepcopy(model).double(), **options).fit(
        [(x.double(), y.double()) for x, y in rows(dtype=torch.float32)]
    )
    assert found.refit_objective_.theta.dtype == torch.float64
    torch.testing.assert_close(
        found.variance(QUERIES.float()).double(), wide.variance(QUERIES.float().double()), rtol=1e-6, atol=0
    )


@pytest.mark.filterwarnings("ignore::estimators.errors.NotConvergedWarning")
def test_without_a_factor_in_float64_a_krylov_space_is_grown(monkeypatch):
    monkeypatch.setattr(to_tolerance, "_MAX_RANK", 300)
    found = RegVar(network(), Gaussian(0.01), prior_precision=1e-10).fit(rows())
    assert "since round-off leaves A without a Cholesky factor" in found.solver_
    assert bool(torch.isfinite(found.variance(QUERIES)).all())
    assert found.relative_error_ > 0.05


@pytest.mark.parametrize("seed", range(3))
def test_the_stated_error_depends_on_round_off_alone(seed):
    options = {"regularizer": PosteriorDraws(2, seed=seed), "rtol": 1e-4}
    found = RegVar(network(), Gaussian(0.01), prior_precision=1.0, **options).fit(rows())
    assert 1e-9 < found.relative_error_ < 1e-4  # the same for every seed, and without a warning
    torch.testing.assert_close(found.standard_error(QUERIES), found.relative_error_ * found.variance(QUERIES))


def test_a_wrong_tolerance_of_refine_is_rejected(regvar):
    with pytest.raises(OptionError, match="rtol"):
        regvar.refine(QUERIES, rtol=-1.0)


@pytest.mark.parametrize(
    ("change", "suits"),
    [({}, True), ({"n": 1200}, False), ({"n_outputs": 6}, False), ({"width": 40}, False), ({"width": 80}, False)],
    ids=["as it is", "fewer rows than parameters", "many outputs", "a space spans it", "too many parameters"],
)
def test_it_is_selected_where_it_takes_less_time_than_a_krylov_space(change, suits):
    model = network(change.get("n_outputs", C), torch.float32, change.get("width", WIDTH))
    loader = rows(change.get("n_outputs", C), torch.float32, change.get("n", N))
    laplace = LinearizedLaplace(model, "regression", prior_precision=DELTA, hessian_structure="diag").fit(loader)
    assert DenseResponse.suits(laplace.objective_.centred(curvature="ggn")) is suits
