"""Mean-field VI and IVON on linear Gaussian models, whose optimum is known, and their formulas written out."""

import math

import pytest
import torch
from torch import nn

from estimators import Gaussian
from estimators.data.batch import Batch
from estimators.errors import ConvergenceError, NotConvergedWarning, OptionError
from estimators.objective.objective import Prior
from estimators.objective.recorded_gradients import BatchGradients
from estimators.training import Recipe, train_map
from estimators.variational import IVON, MeanFieldVI
from estimators.variational.ivon import IVONState, ivon_step
from estimators.variational.mean_field import DEFAULT_RECIPE, kl_divergence

SIGMA, DELTA, PRIOR_MEAN = 0.6, 2.5, 0.2
VI = Recipe(epochs=250, batch_size=7, lr=0.05)
NEWTON = Recipe(epochs=250, batch_size=7, optimizer="sgd", lr=0.1)
FITS = {
    "VI": (MeanFieldVI, {"recipe": VI, "n_gradient_samples": 16}),
    "IVON": (IVON, {"recipe": NEWTON, "n_gradient_samples": 16, "hessian_momentum": 0.99}),
}


class Linear:
    """The posterior N(mean, A⁻¹) of f = Wx + b with its evidence, by dense algebra."""

    def __init__(self, problem):
        x = torch.cat([problem.x, torch.ones(len(problem.x), 1).double()], 1)
        rows = [torch.kron(torch.eye(2).double(), row) for row in x]  # (2, 10): weights of output 0, then of output 1
        order = [0, 1, 2, 3, 5, 6, 7, 8, 4, 9]  # W row by row, then b
        self.j = torch.cat(rows)[:, order]
        self.y = problem.y.flatten()
        self.a = self.j.T @ self.j / SIGMA**2 + DELTA * torch.eye(10).double()
        self.mean = torch.linalg.solve(self.a, self.j.T @ self.y / SIGMA**2 + DELTA * PRIOR_MEAN)
        self.std = self.a.diagonal().rsqrt()
        prior = self.j @ self.j.T / DELTA + SIGMA**2 * torch.eye(len(self.y)).double()
        normal = torch.distributions.MultivariateNormal(PRIOR_MEAN * self.j.sum(1), prior)
        self.log_evidence = float(normal.log_prob(self.y))

    def elbo(self, mean, std):
        """E log N(y; Jθ, σ²) − KL, from the distributions of torch."""
        squares = (self.y - self.j @ mean).square().sum() + (self.j.square() @ std.square()).sum()
        log_p = -0.5 * squares / SIGMA**2 - len(self.y) * math.log(SIGMA * math.sqrt(2 * math.pi))
        normal = torch.distributions.Normal
        prior = normal(torch.full_like(mean, PRIOR_MEAN), torch.full_like(mean, DELTA**-0.5))
        return float(log_p - torch.distributions.kl_divergence(normal(mean, std), prior).sum())


@pytest.fixture
def problem(make_problem):
    return make_problem("regression", nn.Linear(4, 2))


def build(name, problem, **changed):
    kind, options = FITS[name]
    common = {"prior_precision": DELTA, "prior_mean": PRIOR_MEAN}
    return kind(problem.model, Gaussian(SIGMA), **{**common, **options, **changed})


@pytest.mark.parametrize("name", FITS)
def test_the_optimum_of_a_linear_model_is_the_posterior_mean_with_the_precisions_diag_a(name, problem):
    """Noise of the last steps is left: 16 samples, decaying rates."""
    exact, fitted = Linear(problem), build(name, problem).fit(problem.loader)
    assert float(((fitted.mean_ - exact.mean) / exact.std).abs().max()) < 0.1
    assert float((fitted.std_ / exact.std).log().abs().max()) < 0.06
    marginal = torch.linalg.inv(exact.a).diagonal().sqrt()
    assert float((exact.std / marginal).min()) < 0.9  # not the marginal variances
    optimum = exact.elbo(exact.mean, exact.std)
    assert exact.elbo(fitted.mean_, fitted.std_) == pytest.approx(optimum, abs=0.1)
    assert optimum < exact.log_evidence
    assert fitted.elbo_ == pytest.approx(exact.elbo(fitted.mean_, fitted.std_), abs=5 * fitted.elbo_standard_error_)
    assert 0 < fitted.elbo_standard_error_ < 2


def test_the_default_recipe_converges_on_few_rows(problem):
    """20 rows are one step per epoch; warnings are errors."""
    exact, fitted = Linear(problem), build("VI", problem, recipe=DEFAULT_RECIPE, n_gradient_samples=2)
    fitted.fit(problem.loader)
    assert float(((fitted.mean_ - exact.mean) / exact.std).abs().max()) < 0.1
    assert float((fitted.std_ / exact.std).log().abs().max()) < 0.15


def test_epochs_auto_is_at_least_2000_steps_and_200_epochs(problem):
    objective = (
        build("VI", problem, recipe=Recipe(epochs=250, lr=0.05)).fit(problem.loader).objective_
    )  # 6, 6, 6, 2 rows
    expected = {64: 2000, 10: 1000, 3: 286, 1: 200, None: 500}
    for size, epochs in expected.items():
        estimator = build("VI", problem, recipe=Recipe(epochs="auto", batch_size=size))
        assert estimator._resolved_recipe(objective).epochs == epochs


@pytest.mark.parametrize(("initial_std", "size"), [(1e-3, "small"), (5.0, "large")])
def test_a_fit_whose_standard_deviations_are_far_from_the_optimum_warns(initial_std, size, problem):
    few = build("VI", problem, recipe=Recipe(epochs=20), initial_std=initial_std)
    with pytest.warns(NotConvergedWarning, match=f"too {size}"):
        few.fit(problem.loader)


def test_the_measure_of_convergence_is_the_mean_gradient_in_log_s(problem):
    """For a quadratic loss, a pair (ε, −ε) gives (Sε)ᵀH(Sε) of the data term H exactly, whose mean is tr(SHS)."""
    exact, fitted = Linear(problem), build("VI", problem).fit(problem.loader)
    fitted.std_ = torch.linspace(0.1, 0.5, 10).double()
    found = float(fitted._mean_gradient(fitted.objective_, torch.Generator().manual_seed(4)))
    moved = fitted.std_ * torch.randn(10, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    of_data = moved @ (exact.a - DELTA * torch.eye(10)) @ moved
    assert found == pytest.approx(float((of_data + DELTA * fitted.std_.square().sum()) / 10 - 1), rel=1e-9)


def test_rows_of_a_short_batch_weigh_as_much_as_others_in_ivon():
    """Batches of 19 rows and of one outlier, in the order of the loader; one weight per output."""
    x, y = torch.ones(20, 1).double(), torch.zeros(20, 2).double()
    y[19] = torch.tensor([3.0, -2.0])
    precision = 20 / SIGMA**2 + DELTA
    mean = (y.sum(0) / SIGMA**2 + DELTA * PRIOR_MEAN) / precision
    model = nn.Linear(1, 2, bias=False).double().eval()
    with torch.no_grad():
        model.weight.copy_(mean[:, None])
    recipe = Recipe(epochs=400, batch_size=None, optimizer="sgd", lr=0.1)
    options = {"prior_precision": DELTA, "prior_mean": PRIOR_MEAN, "recipe": recipe, "n_gradient_samples": 8}
    ivon = IVON(model, Gaussian(SIGMA), **options, hessian_momentum=0.98)
    ivon.fit([(x[:19], y[:19]), (x[19:], y[19:])])
    assert torch.allclose(ivon.mean_, mean, atol=0.3 * precision**-0.5)
    assert torch.allclose(ivon.std_.square() * precision, torch.ones(2).double(), rtol=0.3)


@pytest.mark.filterwarnings("ignore:Expected a maximum of the ELBO")  # few epochs
def test_the_gradient_is_that_of_the_elbo(problem):
    """Pairs (ε, −ε) make the gradient in m exact for a quadratic loss; that in log s is unbiased."""
    exact, n, calls = Linear(problem), 200, 20
    estimator = build("VI", problem, n_gradient_samples=n, recipe=Recipe(epochs=1)).fit(problem.loader)
    objective, generator = estimator.objective_, torch.Generator().manual_seed(3)
    gradient = estimator._gradient(BatchGradients(objective), generator)
    mean, std = torch.linspace(-1, 1, 10).double(), torch.linspace(0.1, 0.5, 10).double()
    batches = [batch for _ in range(calls) for batch in objective.batches]
    total = sum(gradient(torch.stack([mean, std.log()]), batch) for batch in batches) / calls
    of_mean, of_log_std = exact.a @ (mean - exact.mean), exact.a.diagonal() * std.square() - 1
    assert torch.allclose(total[0], of_mean, rtol=1e-9)
    noise = (exact.a.square() @ std.square()).sqrt() * std  # of one sample, about
    assert float(((total[1] - of_log_std) / noise).abs().max()) < 6 / math.sqrt(n * calls)
    assert float(((total[1] - 2 * of_log_std) / noise).abs().max()) > 0.5  # which would be seen


@pytest.mark.filterwarnings("ignore:Expected a maximum of the ELBO")  # few epochs
def test_minibatches_are_a_part_of_the_elbo_each(problem):
    estimator = build("VI", problem, recipe=Recipe(epochs=2)).fit(problem.loader)
    objective, weights = estimator.objective_, torch.stack([estimator.mean_, estimator.std_.log()])
    x, y = (torch.cat([getattr(b, name) for b in objective.batches]) for name in ("x", "y"))

    def at(batch):  # with equal noise
        return estimator._gradient(BatchGradients(objective), torch.Generator().manual_seed(5))(weights, batch)

    parts = sum(at(batch) for batch in objective.batches)
    assert torch.allclose(parts, at(Batch(x, y)), rtol=1e-9, atol=1e-12)


def test_a_step_of_ivon_is_that_of_the_paper():
    """Algorithm 1 in the paper's units, of the mean loss, with λ = N; the learning rate is not rescaled by h₀ + δ."""
    n, lr, b1, b2 = 23, 0.1, 0.8, 0.97
    generator = torch.Generator().manual_seed(1)
    delta = torch.tensor([0.5, 2.0, 7.0], dtype=torch.float64)
    m, h, g = (torch.rand(3, generator=generator, dtype=torch.float64) for _ in range(3))
    prior_mean = torch.tensor([0.3, -0.1, 0.0], dtype=torch.float64)
    state = IVONState(m.clone(), n * h, n * g, step=4)
    epsilon, g_hat = (torch.randn(3, generator=generator, dtype=torch.float64) for _ in range(2))
    betas = {"lr": lr, "momentum": b1, "hessian_momentum": b2}
    ivon_step(state, n * g_hat[None], epsilon[None], delta, prior_mean, **betas)
    delta = delta / n
    sigma = 1 / (n * (h + delta)).sqrt()
    theta = m + sigma * epsilon
    h_hat = g_hat * (theta - m) / sigma**2
    g = b1 * g + (1 - b1) * g_hat
    new = b2 * h + (1 - b2) * h_hat + 0.5 * (1 - b2) ** 2 * (h - h_hat) ** 2 / (h + delta)
    moved = m - lr * (g / (1 - b1**5) + delta * (m - prior_mean)) / (new + delta)
    assert torch.allclose(state.hessian, n * new, rtol=1e-12)
    assert torch.allclose(state.momentum, n * g, rtol=1e-12)
    assert torch.allclose(state.mean, moved, rtol=1e-12)
    assert torch.allclose(state.variance(n * delta), 1 / (n * (new + delta)), rtol=1e-12)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3, 1e6])
def test_the_precision_of_ivon_stays_positive_for_any_gradient(size):
    delta = torch.tensor([0.5], dtype=torch.float64)
    for slope in (-size, size):
        state = IVONState(torch.zeros(1).double(), torch.full((1,), -0.4).double(), torch.zeros(1).double())
        slopes = torch.tensor([[slope]], dtype=torch.float64)
        options = {"lr": 0.1, "momentum": 0.9, "hessian_momentum": 0.9}
        ivon_step(state, slopes, torch.ones(1, 1).double(), delta, torch.zeros(1).double(), **options)
        assert float(state.hessian + delta) > 0


def test_the_divergence_is_that_of_torch():
    mean, std = torch.linspace(-1, 2, 5).double(), torch.linspace(0.1, 3, 5).double()
    prior = Prior(torch.linspace(0.5, 4, 5).double(), torch.linspace(1, -1, 5).double())
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(prior.mean, prior.precision.rsqrt())).sum()
    assert torch.allclose(kl_divergence(mean, std, prior), expected, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:Expected a maximum of the ELBO")  # few epochs
@pytest.mark.parametrize("name", FITS)
def test_predictions_average_networks_drawn_from_q(name, make_problem):
    problem = make_problem("classification")
    options = {"recipe": FITS[name][1]["recipe"].__class__(epochs=3, optimizer="sgd"), "n_samples": 400}
    fitted = FITS[name][0](problem.model, "classification", **options).fit(problem.loader)
    generator = torch.Generator().manual_seed(9)
    weights = fitted.mean_ + fitted.std_ * torch.randn(4000, 43, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        f = torch.stack([fitted.network_(theta, problem.query) for theta in weights])
    variance = fitted.variance(problem.query)
    assert torch.allclose(variance, f.var(0), rtol=0.45)
    assert torch.allclose(fitted.predict(problem.query).probs, f.softmax(-1).mean(0), atol=0.1)
    assert torch.allclose(fitted.predict(problem.query).probs, fitted.member_outputs(problem.query).softmax(-1).mean(0))


@pytest.mark.parametrize("name", FITS)
def test_bad_options_and_divergence_are_errors(name, problem):
    for option, value in (("n_samples", 1), ("seed", 0.5)):
        with pytest.raises(OptionError, match=option):
            build(name, problem, **{option: value})
    with pytest.raises(OptionError, match="lr"):
        build(name, problem, recipe=Recipe(lr="auto", optimizer="sgd"))
    with pytest.raises(OptionError, match=r"proper prior.*2 weights with δ = 0"):
        build(name, problem, prior_precision={"bias": 0.0, "*": 1.0}).fit(problem.loader)
    with pytest.raises(ConvergenceError, match="smaller lr"):
        build(name, problem, recipe=Recipe(epochs=3, optimizer="sgd", lr=1e305)).fit(problem.loader)


def test_ivon_takes_a_smaller_learning_rate_if_its_mean_leaves_the_data():
    """With little noise, correlated weights make the default diverge without an infinite number."""
    torch.manual_seed(0)
    x = torch.cat([torch.linspace(-2, -1, 30), torch.linspace(1, 2, 30)])[:, None].double()
    y = (2 * x).sin()
    model = nn.Sequential(nn.Linear(1, 30), nn.Tanh(), nn.Linear(30, 1)).double()
    loader = list(zip(x.split(16), y.split(16), strict=True))
    train_map(model, Gaussian(0.05), loader, prior_precision=0.1, recipe=Recipe(epochs=300, lr=1e-2))
    options = {"prior_precision": 0.1, "n_samples": 20, "recipe": Recipe(epochs=60, optimizer="sgd", lr=0.1)}
    fitted = IVON(model, Gaussian(0.05), **options).fit(loader)
    assert fitted.lr_ in (0.1 / 4, 0.1 / 16, 0.1 / 64)
    objective = fitted.objective_
    assert float(objective.loss(fitted.mean_) - objective.loss(objective.theta)) <= objective.theta.numel()
    again = IVON(model, Gaussian(0.05), **options).load_state_dict(fitted.state_dict())
    assert again.lr_ == fitted.lr_


def test_ivon_starts_at_the_initial_hessian_of_the_mean_loss(problem):
    still = {"recipe": Recipe(epochs=1, optimizer="sgd", lr=1e-12), "hessian_momentum": 1 - 1e-12}
    fitted = build("IVON", problem, initial_hessian=0.3, **still).fit(problem.loader)
    objective = fitted.objective_
    expected = (0.3 * objective.batches.n_data + objective.prior.precision).rsqrt()
    assert torch.allclose(fitted.std_, expected.to(fitted.std_), rtol=1e-6)


def test_options_of_one_method_are_checked(problem):
    for option, value in (("initial_std", 0.0), ("n_gradient_samples", 3)):
        with pytest.raises(OptionError, match=option):
            build("VI", problem, **{option: value})
    for option, value in (("initial_hessian", 0.0), ("hessian_momentum", 1.0)):
        with pytest.raises(OptionError, match=option):
            build("IVON", problem, **{option: value})
    for recipe in (Recipe(optimizer="adam"), Recipe(optimizer="sgd", average=0.5)):
        with pytest.raises(OptionError, match="IVON is the optimizer"):
            build("IVON", problem, recipe=recipe)
