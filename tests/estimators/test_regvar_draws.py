"""The mean square of PosteriorDraws: unbiased, relative error √(2/K), less with Rao-Blackwellisation."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from estimators import (
    FineTune,
    Gaussian,
    LastLayerLaplace,
    LinearizedLaplace,
    LinearResponse,
    NewtonRefit,
    PosteriorDraws,
    RegVar,
)
from estimators.errors import ModelError, NotConvergedWarning, OptionError, UnsupportedError
from estimators.regvar.a_norm_error import SampleANormErrors
from estimators.regvar.rao_blackwell import find_rao_blackwell_block
from estimators.training import Recipe


def problem(kind="classification", c=3, n=37):
    generator = torch.Generator().manual_seed(5)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, c)).double().eval()
    x = randn(n, 4)
    y = randn(n, c) if kind == "regression" else torch.randint(0, c, (n,), generator=generator)
    likelihood = Gaussian(0.6) if kind == "regression" else kind
    return model, likelihood, DataLoader(TensorDataset(x, y), batch_size=10), 1.5 * randn(20, 4)


def draws(model, likelihood, loader, k, seed, block):
    regularizer = PosteriorDraws(k, seed=seed, rao_blackwell=block, variance_estimate="monte_carlo")
    return RegVar(model, likelihood, prior_precision=1.7, regularizer=regularizer, solver=LinearResponse()).fit(loader)


@pytest.mark.parametrize(("k", "seeds"), [(16, 20), (2000, 6)])
def test_the_relative_error_of_plain_draws_is_root_two_over_k(k, seeds):
    model, likelihood, loader, x = problem()
    exact = LinearizedLaplace(model, likelihood, prior_precision=1.7).fit(loader).variance(x)
    errors = torch.stack(
        [draws(model, likelihood, loader, k, seed, None).variance(x) / exact - 1 for seed in range(seeds)]
    )
    assert float(errors.square().mean().sqrt()) == pytest.approx(math.sqrt(2 / k), rel=0.15)
    if k == 2000:
        assert float((errors[0].mean()).abs()) <= 4 * math.sqrt(2 / k)


@pytest.mark.parametrize("k", [pytest.param(16, marks=pytest.mark.verification), 128])
def test_rao_blackwellisation_keeps_the_mean_and_lowers_the_error(k):
    model, likelihood, loader, x = problem()
    exact = LinearizedLaplace(model, likelihood, prior_precision=1.7).fit(loader).variance(x)
    n_seeds = 20
    last = LastLayerLaplace(model, likelihood, prior_precision=1.7).fit(loader).variance(x)
    errors = {}
    for block in (None, "last_layer"):
        variances = torch.stack([draws(model, likelihood, loader, k, s, block).variance(x) for s in range(n_seeds)])
        errors[block] = variances / exact - 1
        if block is not None:
            assert bool((variances >= last).all())
    rms = {block: float(e.square().mean().sqrt()) for block, e in errors.items()}
    assert rms["last_layer"] < 0.8 * rms[None]
    assert float(errors["last_layer"].mean()) == pytest.approx(0, abs=4 * rms["last_layer"] / math.sqrt(n_seeds))


@pytest.mark.parametrize("kind", ["regression", "classification"])
@pytest.mark.parametrize("block", [None, "last_layer"])
def test_the_covariance_of_many_draws_tends_to_the_laplace_covariance(kind, block):
    model, likelihood, loader, x = problem(kind)
    exact = LinearizedLaplace(model, likelihood, prior_precision=1.7).fit(loader).covariance(x)
    fitted = draws(model, likelihood, loader, 20000, 0, block)
    covariance = fitted.covariance(x)
    assert float((covariance - exact).norm() / exact.norm()) < 0.03
    assert torch.allclose(covariance.diagonal(dim1=1, dim2=2), fitted.variance(x))


@pytest.mark.parametrize("block", [None, "last_layer"])
def test_samples_have_the_mean_of_the_network_and_the_laplace_covariance_jointly_over_rows(block):
    model, likelihood, loader, x = problem()
    x = x[:4]
    laplace = LinearizedLaplace(model, likelihood, prior_precision=1.7).fit(loader)
    jacobian = laplace.network_.jacobian(x).flatten(0, 1)
    exact = jacobian @ laplace.precision_.solve(jacobian).T  # jointly over rows and outputs
    samples = draws(model, likelihood, loader, 20000, 0, block).sample(x, 20000).flatten(1)
    centre = model(x).detach().flatten()
    assert torch.allclose(samples.mean(0), centre, atol=4 * float(exact.diagonal().max().sqrt()) / math.sqrt(20000))
    deviations = samples - centre
    assert float((deviations.T @ deviations / 20000 - exact).norm() / exact.norm()) < 0.05


def test_more_samples_than_draws_are_rejected_with_the_number_that_would_do():
    model, likelihood, loader, x = problem()
    with pytest.raises(UnsupportedError, match="n_draws=17"):
        draws(model, likelihood, loader, 16, 0, None).sample(x, 17)


def test_the_standard_error_is_root_two_over_k_of_the_drawn_part():
    model, likelihood, loader, x = problem()
    last = LastLayerLaplace(model, likelihood, prior_precision=1.7).fit(loader).variance(x)
    fitted = draws(model, likelihood, loader, 8, 3, "last_layer")
    assert torch.allclose(fitted.standard_error(x), (fitted.variance(x) - last) * math.sqrt(2 / 8))


@pytest.mark.parametrize("block", [None, "last_layer"])
def test_the_a_norm_error_decreases_by_the_squared_distance_to_the_solution(block):
    model, likelihood, loader, _ = problem()
    parts = {
        "prior_precision": 1.7,
        "regularizer": PosteriorDraws(400, rao_blackwell=block, variance_estimate="monte_carlo"),
    }
    short = FineTune(recipe=Recipe(epochs=3, optimizer="sgd", lr="auto"))
    with pytest.warns(NotConvergedWarning, match="more epochs"):
        rough = RegVar(model, likelihood, solver=short, **parts).fit(loader)
    exact = RegVar(model, likelihood, solver=LinearResponse(), **parts).fit(loader)
    precision = LinearizedLaplace(model, likelihood, prior_precision=1.7).fit(loader).precision_
    gap = rough.variance_estimate_.displacement - exact.variance_estimate_.displacement
    truth = float((gap @ precision.cholesky).square().sum(1).mean())  # ‖u − A⁻¹ξ‖²_A, averaged over draws
    n = rough.theta_.numel() - (0 if block is None else 7 * 3)
    a_norm_errors = [fitted.fit_report_.a_norm_error.per_parameter * n for fitted in (rough, exact)]
    assert truth > 0.5
    assert a_norm_errors[0] - a_norm_errors[1] == pytest.approx(truth, rel=1e-6)
    assert a_norm_errors[1] == pytest.approx(0, abs=0.5)  # Monte Carlo alone
    assert rough.a_norm_error_ == rough.fit_report_.a_norm_error.per_dimension


def test_draws_do_not_depend_on_how_the_queries_are_batched():
    model, likelihood, loader, x = problem()
    fitted = draws(model, likelihood, loader, 16, 0, "auto")
    params = torch.cat([fitted.variance(part) for part in x.split(7)])
    assert torch.allclose(fitted.variance(x), params, rtol=1e-12)


def test_the_same_seed_gives_the_same_draws_and_another_seed_others():
    model, likelihood, loader, x = problem()
    first, again, other = (draws(model, likelihood, loader, 16, seed, "auto").variance(x) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("solver", [LinearResponse(), NewtonRefit(), FineTune()])
def test_the_hessian_is_rejected_with_what_is_right_for_it(solver):
    model, likelihood, _, _ = problem()
    with pytest.raises(UnsupportedError, match=r"sandwich.*ParameterProbes"):
        RegVar(model, likelihood, curvature="hessian", regularizer=PosteriorDraws(), solver=solver)


def tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode = nn.Linear(4, 4, bias=False)
            self.decode = nn.Linear(4, 4, bias=False)
            self.decode.weight = self.encode.weight

        def forward(self, x):
            return self.decode(torch.tanh(self.encode(x)))

    return Tied()


def frozen():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
    model[2].requires_grad_(requires_grad=False)
    return model


CASES = {
    "tied": (tied, "all", "shared"),
    "frozen": (frozen, "all", "frozen"),
    "outside": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)), "0.*", "not all of it inside"),
    "partly": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)), "*weight", "not all of it inside"),
    "alone": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)), "last_layer", "alone"),
    "not linear": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()), "all", "produce the output"),
}


def test_auto_skips_rao_blackwellisation_for_a_vocabulary_of_fifty_thousand():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 50_000))
    x, y = torch.zeros(3, 4), torch.arange(3)
    objective = RegVar(model.eval(), "classification")._build_objective([(x, y)])
    block, reason = find_rao_blackwell_block(objective, "auto")
    assert block is None
    assert "450000" in reason
    with pytest.raises(OptionError, match="450000"):
        find_rao_blackwell_block(objective, "last_layer")


@pytest.mark.parametrize("case", CASES)
def test_auto_skips_rao_blackwellisation_and_says_why(case):
    make, subset, reason = CASES[case]
    _, _, loader, x = problem("regression", c=4)
    model = make().double().eval()
    fitted = RegVar(
        model,
        Gaussian(0.6),
        subset_of_weights=subset,
        regularizer=PosteriorDraws(4000),
        solver=LinearResponse(),
    ).fit(loader)
    assert fitted.rao_blackwell_.startswith("none")
    assert reason in fitted.rao_blackwell_
    exact = LinearizedLaplace(model, Gaussian(0.6), subset_of_weights=subset).fit(loader).variance(x)
    assert torch.allclose(fitted.variance(x), exact, rtol=5 * math.sqrt(2 / 4000))
    insisting = RegVar(
        model, Gaussian(0.6), subset_of_weights=subset, regularizer=PosteriorDraws(rao_blackwell="last_layer")
    )
    with pytest.raises((OptionError, ModelError)):
        insisting.fit(loader)


def test_a_last_layer_too_large_to_factor_is_left_to_the_draws(monkeypatch):
    monkeypatch.setattr("estimators.regvar.rao_blackwell._MAX_PARAMETERS", 20)
    model, likelihood, loader, _ = problem()
    assert "at most 20 parameters" in draws(model, likelihood, loader, 4, 0, "auto").rao_blackwell_


def test_the_block_in_use_is_named_with_its_size():
    model, likelihood, loader, _ = problem()
    assert draws(model, likelihood, loader, 4, 0, "auto").rao_blackwell_ == "last layer '2': 21 of 51 parameters"


def test_parameters_without_a_prior_are_drawn_too():
    model, likelihood, loader, x = problem("regression")
    delta = {"*bias": 0.0, "*": 1.7}
    exact = LinearizedLaplace(model, likelihood, prior_precision=delta, inverse="cholesky").fit(loader).variance(x)
    regularizer = PosteriorDraws(4000, rao_blackwell=None)
    fitted = RegVar(model, likelihood, prior_precision=delta, regularizer=regularizer, solver=LinearResponse())
    assert torch.allclose(fitted.fit(loader).variance(x), exact, rtol=5 * math.sqrt(2 / 4000))


@pytest.mark.parametrize(
    "bad", [{"n_draws": 0}, {"n_draws": 2.5}, {"rao_blackwell": "first_layer"}, {"variance_estimate": "mean"}]
)
def test_bad_options_are_rejected(bad):
    with pytest.raises(OptionError, match=str(next(iter(bad.values())))):
        PosteriorDraws(**bad)


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_draws_of_weights_that_the_data_say_nothing_about_have_a_finite_error(scale):
    """Beside a last layer of zeros all other weights keep their prior: their effective dimension is 0."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    nn.init.zeros_(model[2].weight)
    x = scale * torch.randn(11, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loader = [(x[:4], x[:4, :1]), (x[4:], x[4:, :1])]
    regvar = RegVar(model, "regression", prior_precision=2.0, solver=FineTune()).fit(loader)
    exact = LinearizedLaplace(model, "regression", prior_precision=2.0).fit(loader)
    torch.testing.assert_close(regvar.variance(x), exact.variance(x), rtol=1e-8, atol=0)
    assert math.isfinite(regvar.relative_error_)


def test_the_error_per_dimension_is_in_units_of_round_off_where_there_is_no_dimension():
    terms = torch.tensor([[5 * (1 + 1e-15), 5.0, 5.0, 5.0, 1e-14]], dtype=torch.float64)
    error = SampleANormErrors(terms, 5.0).error
    assert 0 < error.clipped < 10
