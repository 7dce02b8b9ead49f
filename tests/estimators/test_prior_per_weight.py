"""A prior precision and a prior mean for each weight: tensors (P,), and mappings from names to tensors."""

import numpy as np
import pytest
import torch
from torch import nn
from weight_space_fits import close

from estimators import Gaussian, LastLayerLaplace, LinearizedLaplace, LinearResponse, Pointwise, PosteriorDraws, RegVar
from estimators.baselines import LaplaceTorch, SubnetworkLaplace
from estimators.errors import OptionError, StateError
from estimators.training import Recipe, train_map
from estimators.tuning import tune

P = 43


def per_weight(n=P, seed=2):
    return 0.5 + 3 * torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_name(model, vector):
    """The same numbers by the names of the parameters, in another order."""
    sizes = [p.numel() for p in model.parameters()]
    parts = zip(model.named_parameters(), vector.split(sizes), strict=True)
    return dict(reversed([(name, part.view(p.shape)) for (name, p), part in parts]))


EXACT = {
    "cholesky": (LinearizedLaplace, {"inverse": "cholesky"}),
    "dual": (LinearizedLaplace, {"inverse": "dual"}),
    "matrix_free_dual": (LinearizedLaplace, {"inverse": "matrix_free_dual"}),
    "cg": (LinearizedLaplace, {"inverse": "cg"}),
    "low rank, all of it": (LinearizedLaplace, {"hessian_structure": "lowrank"}),
    "subnetwork, all of it": (SubnetworkLaplace, {}),
    "regvar": (RegVar, {"regularizer": Pointwise(), "solver": LinearResponse()}),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_each_weight_has_its_own_precision(name, kind, make_problem, by_hand):
    problem, (estimator, options) = make_problem(kind), EXACT[name]
    delta = per_weight(sum(p.numel() for p in problem.model.parameters()))
    expected = by_hand(problem).covariance(problem.query, delta=delta)
    fitted = estimator(problem.model, problem.likelihood, prior_precision=delta, **options).fit(problem.loader)
    close(fitted.covariance(problem.query), expected)
    named = estimator(problem.model, problem.likelihood, prior_precision=by_name(problem.model, delta), **options).fit(
        problem.loader
    )
    close(named.variance(problem.query), fitted.variance(problem.query), rtol=1e-12)


def test_rows_in_factors_become_whole_rows(make_problem, by_hand):
    """Products of factors need a δ that is equal for all outputs of a layer."""
    problem = make_problem("classification", nn.Sequential(nn.Linear(4, 80), nn.Tanh(), nn.Linear(80, 3)))
    delta = per_weight(643)
    options = {"inverse": "dual", "prior_precision": delta}
    fitted = LinearizedLaplace(problem.model, problem.likelihood, **options).fit(problem.loader)
    assert type(fitted.data_curvature_).__name__ == "FactoredCurvature"
    close(fitted.covariance(problem.query), by_hand(problem).covariance(problem.query, delta=delta))
    other = per_weight(643, seed=4)
    one = LinearizedLaplace(problem.model, problem.likelihood, inverse="dual").fit(problem.loader)
    close(
        one.clone_with(prior_precision=other).covariance(problem.query),
        by_hand(problem).covariance(problem.query, delta=other),
    )
    expected = fitted.clone_with(prior_precision=other).log_marginal_likelihood()
    close(fitted.log_marginal_likelihood(other), expected, rtol=1e-9)


def test_the_diagonal_has_each_precision(make_problem, by_hand):
    problem, delta = make_problem("classification"), per_weight()
    fitted = LinearizedLaplace(problem.model, problem.likelihood, prior_precision=delta, hessian_structure="diag").fit(
        problem.loader
    )
    expected = 1 / (by_hand(problem).data_ggn().diagonal() + delta)
    close(fitted.posterior_variance(), expected)
    jacobian = by_hand(problem).jacobian(problem.query)
    close(fitted.variance(problem.query), (jacobian.square() * expected).sum(-1))


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_the_last_layer_has_each_precision(structure, make_problem, by_hand):
    problem, delta = make_problem("classification"), per_weight(18)
    fitted = LastLayerLaplace(
        problem.model, problem.likelihood, prior_precision=delta, hessian_structure=structure
    ).fit(problem.loader)
    hand = by_hand(problem, ["2.weight", "2.bias"])
    precision = hand.precision(delta=delta)
    precision = precision if structure == "full" else precision.diagonal().diag()
    jacobian = hand.jacobian(problem.query)
    close(fitted.variance(problem.query), torch.einsum("mcp,pq,mcq->mc", jacobian, precision.inverse(), jacobian))


@pytest.mark.parametrize("kind", [LinearizedLaplace, LastLayerLaplace])
def test_a_kronecker_basis_takes_one_precision_per_layer(kind, make_problem):
    problem = make_problem("classification")
    delta = per_weight() if kind is LinearizedLaplace else per_weight(18)
    estimator = kind(problem.model, problem.likelihood, prior_precision=delta, hessian_structure="kron")
    with pytest.raises(OptionError, match="diag"):
        estimator.fit(problem.loader)


def test_draws_have_each_precision_and_lie_between_their_bounds(make_problem, by_hand):
    problem = make_problem("regression", nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)))
    delta = per_weight(37)
    fitted = RegVar(
        problem.model,
        problem.likelihood,
        prior_precision=delta,
        regularizer=PosteriorDraws(12, variance_estimate="bounds"),
        solver=LinearResponse(),
    ).fit(problem.loader)
    exact = by_hand(problem).variance(problem.query, delta=delta)
    lower, upper = fitted.variance_bounds(problem.query)
    assert bool((lower <= exact * (1 + 1e-9)).all())
    assert bool((exact <= upper * (1 + 1e-9)).all())
    close(fitted.variance(problem.query), exact, rtol=1e-3)


def test_a_number_and_a_tensor_may_stand_in_one_mapping(make_problem):
    problem = make_problem("classification")
    bias = torch.tensor([0.4, 0.5, 0.6, 0.7, 0.8])
    fitted = LinearizedLaplace(problem.model, problem.likelihood, prior_precision={"0.bias": bias, "*": 2.0})
    prior = fitted.fit(problem.loader).objective_.prior.precision
    assert torch.equal(prior[20:25], bias.double())
    assert set(prior[:20].tolist()) | set(prior[25:].tolist()) == {2.0}


# Means


def test_the_mean_of_each_weight_enters_the_marginal_likelihood(make_problem):
    problem, delta, mean = make_problem("regression"), per_weight(37), per_weight(37, seed=5) - 1
    options = {"prior_precision": delta}
    plain = LinearizedLaplace(problem.model, problem.likelihood, **options).fit(problem.loader)
    theta = plain.theta_
    expected = plain.log_marginal_likelihood() + 0.5 * (delta * (theta.square() - (theta - mean).square())).sum()
    for given in (mean, by_name(problem.model, mean), mean.numpy()):
        shifted = LinearizedLaplace(problem.model, problem.likelihood, prior_mean=given, **options).fit(problem.loader)
        close(shifted.log_marginal_likelihood(), expected, rtol=1e-10)
        close(shifted.variance(problem.query), plain.variance(problem.query), rtol=1e-12)


class TiedWithBuffer(nn.Module):
    """A weight with two names, and statistics."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.norm, self.last = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.norm(torch.tanh(self.second(torch.tanh(self.first(x))))))


def test_a_state_dict_is_a_mean(make_problem):
    """Such as the weights before fine-tuning; buffers and second names of tied weights are in it."""
    problem = make_problem("classification", TiedWithBuffer())
    before = TiedWithBuffer().double().state_dict()
    fitted = LinearizedLaplace(problem.model, problem.likelihood, prior_mean=before).fit(problem.loader)
    mean = fitted.network_.subset.unflatten(fitted.objective_.prior.mean)
    assert set(mean) == set(dict(problem.model.named_parameters()))
    assert all(torch.equal(mean[name], before[name]) for name in mean)


def test_the_weights_are_the_mean_of_their_own_state_dict(make_problem):
    problem = make_problem("regression")
    regvar = RegVar(
        problem.model,
        problem.likelihood,
        prior_mean={name: p + 0.1 for name, p in problem.model.state_dict().items()},
        prior_precision=3.0,
        regularizer=Pointwise(),
        solver=LinearResponse(),
    ).fit(problem.loader)
    close(regvar.objective_.prior.mean, regvar.theta_ + 0.1, rtol=1e-12)


def test_training_shrinks_each_weight_by_its_own_precision():
    """Ridge regression in closed form."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 3, generator=generator).double()
    y = torch.randn(30, 1, generator=generator).double()
    delta = torch.tensor([0.5, 60.0, 7.0], dtype=torch.float64)
    expected = torch.linalg.solve(x.T @ x / 0.25 + delta.diag(), x.T @ y / 0.25)[:, 0]
    for given in (delta, {"weight": delta[None]}):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Linear(3, 1, bias=False).double()
        train_map(
            model,
            Gaussian(0.5),
            [(x, y)],
            prior_precision=given,
            recipe=Recipe(epochs=300, batch_size=30, optimizer="adam", lr=0.05),
        )
        close(model.weight[0].detach(), expected, rtol=1e-3)


# Saving and refitting


@pytest.mark.parametrize("option", ["prior_precision", "prior_mean"])
def test_tensors_are_compared_by_value_when_a_fit_is_loaded(option, make_problem, tmp_path):
    problem, values = make_problem("classification"), per_weight()
    LinearizedLaplace(problem.model, problem.likelihood, **{option: values}).fit(problem.loader).save(tmp_path / "fit")
    expected = LinearizedLaplace(problem.model, problem.likelihood, **{option: values}).fit(problem.loader)
    for equal in (values.clone(), values.numpy()):
        loaded = LinearizedLaplace(problem.model, problem.likelihood, **{option: equal}).load(tmp_path / "fit")
        assert torch.equal(loaded.variance(problem.query), expected.variance(problem.query))
    other = values.clone()
    other[21] *= 1.001
    for different in (other, 1.0, {"*": 1.0}, by_name(problem.model, values)):
        with pytest.raises(StateError, match=option):
            LinearizedLaplace(problem.model, problem.likelihood, **{option: different}).load(tmp_path / "fit")


def test_options_keep_copies_of_their_tensors(make_problem):
    problem, values, named = make_problem("classification"), per_weight(), {"*": 2.0, "0.bias": torch.ones(5)}
    named = {"0.bias": torch.ones(5), "*": 2.0}
    first = LinearizedLaplace(problem.model, problem.likelihood, prior_precision=values, prior_mean=named)
    expected = per_weight()
    values *= 7
    named["0.bias"] += 1
    assert torch.equal(first.prior_precision, expected)
    assert torch.equal(first.prior_mean["0.bias"], torch.ones(5))


def test_a_fit_is_cloned_with_another_precision_for_each_weight(make_problem, by_hand):
    problem, delta = make_problem("classification"), per_weight()
    fitted = LinearizedLaplace(problem.model, problem.likelihood, prior_precision=2.5).fit(problem.loader)
    clone = fitted.clone_with(prior_precision=delta)
    close(clone.covariance(problem.query), by_hand(problem).covariance(problem.query, delta=delta))
    assert clone.passes_ < 0.5 * fitted.passes_
    low = fitted.clone_with(hessian_structure="lowrank")
    close(low.clone_with(prior_precision=delta).covariance(problem.query), clone.covariance(problem.query), rtol=1e-6)


FITS = {
    "full": (LinearizedLaplace, {}),
    "diag": (LinearizedLaplace, {"hessian_structure": "diag"}),
    "draws": (RegVar, {}),
}


@pytest.mark.filterwarnings("ignore::estimators.errors.TuningBoundaryWarning")
@pytest.mark.parametrize("form", ["vector", "names"])
@pytest.mark.parametrize("name", FITS)
def test_a_precision_for_each_weight_is_calibrated_cloned_and_tuned(name, form, make_problem):
    problem, kind, options = make_problem("classification"), *FITS[name]
    delta = per_weight() if form == "vector" else {"0.bias": per_weight(5), "*": 2.0}
    fitted = kind(problem.model, problem.likelihood, prior_precision=delta, **options)
    fitted = fitted.fit(problem.loader, val_loader=problem.loader)
    assert fitted.calibration_ is not None
    again = kind(problem.model, problem.likelihood, prior_precision=fitted.prior_precision_, **options)
    expected = again.fit(problem.loader).variance(problem.query)
    close(fitted.variance(problem.query), expected)
    close(fitted.clone_with().variance(problem.query), expected)
    other = 3 * per_weight()
    tuned = tune(fitted, problem.loader, values=[fitted.prior_precision_, other])
    assert len(tuned.trials) == 2  # the given value is not fitted twice


# Bad input


@pytest.mark.parametrize(
    "bad",
    [
        torch.full((P,), -1.0),
        torch.full((P,), float("nan")),
        torch.full((P,), True),
        torch.ones(P, dtype=torch.complex64),
        np.array(["1.0"] * P),
        {"*": torch.full((5,), -1.0)},
        {"*": torch.tensor([1.0, float("inf")])},
        [1.0] * P,
    ],
    ids=repr,
)
def test_a_precision_that_is_none_raises_at_once(bad, make_problem):
    problem = make_problem("classification")
    with pytest.raises(OptionError, match=r"prior_precision > 0"):
        LinearizedLaplace(problem.model, problem.likelihood, prior_precision=bad)


@pytest.mark.parametrize("bad", [torch.full((P,), float("nan")), {"*": "1"}, {}, "0", [0.0], {0: 1.0}, None], ids=repr)
def test_a_mean_that_is_none_raises_at_once(bad, make_problem):
    problem = make_problem("classification")
    with pytest.raises(OptionError, match="prior_mean"):
        LinearizedLaplace(problem.model, problem.likelihood, prior_mean=bad)


@pytest.mark.parametrize("option", ["prior_precision", "prior_mean"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.ones(P - 1), r"\(43,\).*\(42,\)"),
        (torch.ones(P, 1), r"\(43,\).*\(43, 1\)"),
        ({"0.bias": torch.ones(4), "*": 1.0}, r"\(5,\).*0\.bias.*\(4,\)"),
        ({"0.weight": torch.ones(4, 5), "*": 1.0}, r"\(5, 4\).*0\.weight.*\(4, 5\)"),
        ({"*": torch.ones(5)}, "shape"),
        ({"0.*": 1.0}, "without a match for '2.weight'"),
        ({"*": 1.0, "0.bias": torch.ones(5)}, "decided by"),
        ({"head": torch.ones(5), "*": 1.0}, "matches none"),
    ],
    ids=repr,
)
def test_tensors_of_another_shape_raise_at_the_fit(option, bad, message, make_problem):
    problem = make_problem("classification")
    estimator = LinearizedLaplace(problem.model, problem.likelihood, **{option: bad})
    with pytest.raises(OptionError, match=f"{option}.*{message}"):
        estimator.fit(problem.loader)


def test_laplace_torch_takes_one_precision(make_problem):
    problem = make_problem("classification")
    for options in ({"prior_precision": per_weight()}, {"prior_mean": per_weight()}, {"prior_mean": {"*": 0.1}}):
        with pytest.raises(OptionError, match="tensor"):
            LaplaceTorch(problem.model, problem.likelihood, **options)
