"""Gradient norm, subnetwork and temperature against dense formulas written a second time."""

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn
from torch.nn import functional as F

from estimators import Categorical, LinearizedLaplace
from estimators.baselines import MAP, GradientNorm, SubnetworkLaplace, TemperatureScaling
from estimators.errors import DataError, NotConvergedWarning, OptionError, UnsupportedError

KINDS = pytest.mark.parametrize("kind", ["classification", "binary", "regression"])


class Attention(nn.Module):
    """Weights that are used at many places, and some outside of linear layers."""

    def __init__(self):
        super().__init__()
        self.norm, self.attend, self.head = (
            nn.LayerNorm(4),
            nn.MultiheadAttention(4, 2, batch_first=True),
            nn.Linear(4, 3),
        )

    def forward(self, x):
        h = self.norm(x)
        return self.head(self.attend(h, h, h, need_weights=False)[0].mean(1))


NETWORKS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)), (1, 3, 3)),
    "attention": (Attention, (5, 4)),
}


def gradients(model, x):
    """∂f_c/∂θ (M, C, P) by one backward each."""
    rows = []
    for one in x:
        f = model(one[None])[0]
        slopes = [torch.autograd.grad(f_c, list(model.parameters()), retain_graph=True) for f_c in f]
        rows.append(torch.stack([torch.cat([s.reshape(-1) for s in per_output]) for per_output in slopes]))
    return torch.stack(rows)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_gradient_norm_is_that_of_a_loop_over_outputs(network, make_problem):
    build, shape = NETWORKS[network]
    problem = make_problem("classification", build(), shape=shape)
    fitted = GradientNorm(problem.model, "classification", prior_precision=7.0).fit(problem.loader)
    jacobian = gradients(problem.model, problem.query)
    assert torch.allclose(fitted.variance(problem.query), jacobian.square().sum(-1), rtol=1e-10)
    assert torch.allclose(fitted.covariance(problem.query), jacobian @ jacobian.transpose(1, 2), rtol=1e-10, atol=1e-12)
    margin = gradients(Margin(problem.model), problem.query)
    found = fitted.variance(problem.query, of=lambda f: (f[0] - f[1]).tanh())
    assert torch.allclose(found, margin.square().sum(-1), rtol=1e-9)


class Margin(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        f = self.model(x)
        return (f[:, :1] - f[:, 1:2]).tanh()


def test_samples_of_the_gradient_norm_have_its_covariance(make_problem):
    problem = make_problem("classification")
    fitted = GradientNorm(problem.model, "classification").fit(problem.loader)
    deviations = fitted.sample(problem.query, 20_000, seed=3) - problem.model(problem.query).detach()
    found, exact = torch.einsum("kmc,kmd->mcd", deviations, deviations) / 20_000, fitted.covariance(problem.query)
    assert torch.allclose(found, exact, atol=6 * float(exact.max()) / 20_000**0.5)


def test_the_gradient_norm_over_the_prior_bounds_the_laplace_variance(make_problem):
    problem = make_problem("classification")
    norm = GradientNorm(problem.model, "classification").fit(problem.loader).variance(problem.query)
    laplace = LinearizedLaplace(problem.model, "classification", prior_precision=2.5).fit(problem.loader)
    assert (laplace.variance(problem.query) < norm / 2.5).all()


@pytest.mark.parametrize("subset", ["all", "last_layer", "0.*"])
@pytest.mark.parametrize("chosen_by", ["variance", "magnitude"])
def test_a_subnetwork_of_all_weights_is_the_full_laplace(subset, chosen_by, make_problem):
    problem = make_problem("classification")
    options = {"prior_precision": {"*bias": 0.7, "*": 1.9}, "subset_of_weights": subset}
    part = SubnetworkLaplace(problem.model, "classification", n_parameters=999, chosen_by=chosen_by, **options)
    full = LinearizedLaplace(problem.model, "classification", inverse="cholesky", **options).fit(problem.loader)
    part.fit(problem.loader)
    assert len(part.index_) == part.network_.n_parameters
    assert torch.allclose(part.covariance(problem.query), full.covariance(problem.query), rtol=1e-9, atol=1e-12)
    assert torch.allclose(
        part.variance(problem.query, of=lambda f: f.softmax(-1)),
        full.variance(problem.query, of=lambda f: f.softmax(-1)),
        rtol=1e-8,
    )


@KINDS
@pytest.mark.parametrize("n", [1, 7, 20])
def test_a_subnetwork_is_the_dense_formula_of_the_weights_with_the_largest_marginal_variance(
    kind, n, make_problem, by_hand
):
    problem = make_problem(kind)
    reference = by_hand(problem)
    fitted = SubnetworkLaplace(problem.model, problem.likelihood, prior_precision=2.5, n_parameters=n)
    fitted.fit(problem.loader)
    a = reference.precision()
    index = a.diagonal().argsort()[:n].sort().values  # the smallest precisions
    assert torch.equal(fitted.index_, index)
    jacobian = reference.jacobian(problem.query)[..., index]
    expected = jacobian @ torch.linalg.inv(a[index][:, index]) @ jacobian.transpose(1, 2)
    assert torch.allclose(fitted.covariance(problem.query), expected, rtol=1e-8, atol=1e-12)
    assert torch.allclose(fitted.variance(problem.query), expected.diagonal(dim1=1, dim2=2), rtol=1e-8, atol=1e-12)


def test_the_largest_weights_are_chosen_by_magnitude(make_problem, by_hand):
    problem = make_problem("classification")
    fitted = SubnetworkLaplace(problem.model, "classification", n_parameters=6, chosen_by="magnitude")
    theta = by_hand(problem).theta
    index = fitted.fit(problem.loader).index_
    assert len(index) == 6
    others = torch.ones(len(theta), dtype=torch.bool).index_fill(0, index, value=False)
    assert float(theta[index].abs().min()) > float(theta[others].abs().max())


@KINDS
def test_no_subnetwork_has_more_variance_than_a_larger_one_or_than_the_whole(kind, make_problem):
    problem = make_problem(kind)
    options = {"prior_precision": 2.5}
    largest = LinearizedLaplace(problem.model, problem.likelihood, **options).fit(problem.loader)
    above = largest.variance(problem.query)
    for n in (35, 21, 12, 5, 1):  # the weights of each are among those of the one before
        part = SubnetworkLaplace(problem.model, problem.likelihood, n_parameters=n, **options).fit(problem.loader)
        assert (part.variance(problem.query) <= above + 1e-12).all()
        above = part.variance(problem.query)
    assert float(above.max()) > 0


def test_samples_of_a_subnetwork_have_its_covariance(make_problem):
    problem = make_problem("classification")
    fitted = SubnetworkLaplace(problem.model, "classification", prior_precision=2.5, n_parameters=12)
    exact = fitted.fit(problem.loader).covariance(problem.query)
    deviations = fitted.sample(problem.query, 20_000, seed=3) - problem.model(problem.query).detach()
    found = torch.einsum("kmc,kmd->mcd", deviations, deviations) / 20_000
    assert torch.allclose(found, exact, atol=6 * float(exact.max()) / 20_000**0.5)


def test_the_precision_of_a_subnetwork_solves_in_its_place(make_problem):
    problem = make_problem("classification")
    fitted = SubnetworkLaplace(problem.model, "classification", prior_precision=2.5, n_parameters=5).fit(problem.loader)
    v = torch.randn(3, fitted.network_.n_parameters, dtype=torch.float64)
    solved, index = fitted.precision_.solve(v), fitted.index_
    a = fitted.data_curvature_.matrix + 2.5 * torch.eye(5).double()
    assert torch.allclose(solved[:, index], torch.linalg.solve(a, v[:, index].T).T, rtol=1e-10)
    assert int((solved != 0).sum()) == 15
    assert torch.allclose(fitted.precision_.log_det(), torch.logdet(a))


def test_subnetwork_options_that_cannot_be_are_refused(make_problem):
    model = make_problem().model
    for bad in (0, -1, 2.5):
        with pytest.raises(OptionError, match="n_parameters >= 1"):
            SubnetworkLaplace(model, "classification", n_parameters=bad)
    with pytest.raises(OptionError, match=r"chosen_by.*random"):
        SubnetworkLaplace(model, "classification", chosen_by="random")


def overconfident(make_problem, kind):
    """Logits ten times too large for labels that follow them in part."""
    problem = make_problem(kind, n=200)
    with torch.no_grad():
        f = problem.model(problem.x)
        probs = 3 * f
        problem.y = (
            torch.distributions.Categorical(logits=probs).sample()
            if kind == "classification"
            else torch.distributions.Bernoulli(logits=probs).sample()
        )
        problem.model[2].weight.mul_(30)
        problem.model[2].bias.mul_(30)
    return problem


@pytest.mark.parametrize("kind", ["classification", "binary"])
def test_the_temperature_is_the_minimum_of_the_validation_loss(kind, make_problem):
    problem = overconfident(make_problem, kind)
    x, y = problem.x[120:], problem.y[120:]
    validation = [(x[:33], y[:33]), (x[33:], y[33:])]
    fitted = TemperatureScaling(problem.model, kind, validation=validation).fit(problem.loader)
    f = problem.model(x).detach()
    loss = F.cross_entropy if kind == "classification" else F.binary_cross_entropy_with_logits
    by_hand = minimize_scalar(lambda beta: float(loss(beta * f, y)), bracket=(0.05, 0.1), tol=1e-12)
    assert fitted.temperature_ == pytest.approx(1 / by_hand.x, rel=1e-6)
    assert 3 < fitted.temperature_ < 40
    beta = torch.tensor(1 / fitted.temperature_, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(beta * f, y), beta)
    assert abs(float(slope)) < 1e-6
    prediction = fitted.predict(problem.query)
    scaled = problem.model(problem.query).detach() / fitted.temperature_
    assert torch.allclose(prediction.mean, scaled, rtol=1e-12)
    probs = scaled.softmax(-1) if kind == "classification" else scaled.sigmoid()
    assert torch.allclose(prediction.probs, probs, rtol=1e-12)
    assert torch.allclose(fitted.predict(problem.query, link_approx="mc", n_samples=3).probs, probs, rtol=1e-12)
    assert float(prediction.epistemic_variance.abs().max()) == 0
    by_calibration = MAP(problem.model, kind).fit(problem.loader).predict(problem.query)
    by_calibration = by_calibration.calibrated(softmax_temperature=fitted.temperature_)
    assert torch.allclose(by_calibration.probs, probs, rtol=1e-12)


def test_temperature_of_pixels_leaves_ignored_ones_out(make_problem):
    class Pixels(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 1)

        def forward(self, x):
            return 5 * self.conv(x)

    problem = make_problem("regression", Pixels(), shape=(1, 2, 2))
    f = problem.model(problem.x).detach()
    y = torch.distributions.Categorical(logits=f.movedim(1, -1) / 5).sample()
    y[:, 0, 0] = -100
    fitted = TemperatureScaling(problem.model, Categorical(class_dim=1), validation=[(problem.x, y)])
    fitted.fit([(problem.x, y)])
    flat, kept = f.movedim(1, -1).reshape(-1, 3), y.reshape(-1) != -100
    by_hand = minimize_scalar(lambda b: float(F.cross_entropy(b * flat[kept], y.reshape(-1)[kept])), tol=1e-12)
    assert fitted.temperature_ == pytest.approx(1 / by_hand.x, rel=1e-6)
    assert fitted.predict(problem.query).probs.shape == (7, 3, 2, 2)


def test_a_validation_set_without_an_error_determines_no_temperature(make_problem):
    problem = make_problem("classification")
    y = problem.model(problem.x).argmax(-1)
    fitted = TemperatureScaling(problem.model, "classification", validation=[(problem.x, y)])
    with pytest.warns(NotConvergedWarning, match="bound, 0.01"):
        fitted.fit(problem.loader)


def test_what_has_no_temperature_is_refused(make_problem):
    problem = make_problem("regression")
    with pytest.raises(UnsupportedError, match=r"Gaussian\(sigma_noise=0.6\).*sigma_noise tuned"):
        TemperatureScaling(problem.model, problem.likelihood, validation=problem.loader)
    classes = make_problem("classification")
    for validation in ([], [(classes.x, classes.y + 3)], [(classes.x[:, :2], classes.y)]):
        with pytest.raises(DataError):
            TemperatureScaling(classes.model, "classification", validation=validation).fit(classes.loader)
