"""The dual form without its rows: equal to the one that keeps them, on every kind of layer."""

import pytest
import torch
from torch import nn

from estimators import LinearizedLaplace
from estimators.curvature.layerwise import matrix_free_dual
from estimators.errors import NonDeterministicError, NotFittedError, OptionError, TooLargeError


class Tokens(nn.Module):
    """An embedding of which most rows are not used, a layer at several places, and a norm."""

    def __init__(self):
        super().__init__()
        self.embedding, self.inner = nn.Embedding(50, 4), nn.Linear(4, 4)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x):
        tokens = (7 * x).long().remainder(50)
        return self.head(self.norm(torch.tanh(self.inner(self.embedding(tokens)))).mean(1))


def convolutional():
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def with_images(make_problem):
    return make_problem(model=convolutional(), shape=(2, 4, 4))


PROBLEMS = {
    "plain": lambda make: make(),
    "regression": lambda make: make("regression"),
    "binary": lambda make: make("binary"),
    "images": with_images,
    "tokens": lambda make: make(model=Tokens(), shape=(5,)),
}


def fit(problem, inverse, **options):
    options = {"prior_precision": problem.delta, **options}
    return LinearizedLaplace(problem.model, problem.likelihood, inverse=inverse, **options).fit(problem.loader)


def close(a, b):
    return torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kept", [1, 2**31])  # bytes: a layer a pass, or all of them in one
@pytest.mark.parametrize("name", PROBLEMS)
def test_it_answers_as_the_form_that_keeps_its_rows(name, kept, make_problem, monkeypatch):
    problem = PROBLEMS[name](make_problem)
    monkeypatch.setattr(matrix_free_dual, "_KEPT_BYTES", kept)
    dual, matrix_free = fit(problem, "dual"), fit(problem, "matrix_free_dual")
    assert matrix_free.inverse_ == "matrix_free_dual"
    assert close(matrix_free.variance(problem.query), dual.variance(problem.query))
    assert close(matrix_free.covariance(problem.query), dual.covariance(problem.query))
    assert close(matrix_free.log_marginal_likelihood(), dual.log_marginal_likelihood())
    vectors = torch.randn(2, matrix_free.theta_.numel(), dtype=torch.float64)
    assert close(matrix_free.precision_.solve(vectors), dual.precision_.solve(vectors))


@pytest.mark.parametrize("delta", [7.0, {"0.*": 3.0, "*": 1.5}], ids=["a number", "by name"])
def test_another_prior_is_that_of_a_new_fit(delta, make_problem):
    problem = make_problem()
    fitted, anew = fit(problem, "matrix_free_dual"), fit(problem, "dual", prior_precision=delta)
    assert close(fitted.log_marginal_likelihood(delta), anew.log_marginal_likelihood())


def test_samples_have_the_covariance(make_problem):
    problem = make_problem()
    fitted = fit(problem, "matrix_free_dual")
    f = fitted.predict(problem.query).mean
    samples = fitted.sample(problem.query, 4000) - f
    ratio = samples.square().mean(0) / fitted.variance(problem.query)
    assert float((ratio - 1).abs().max()) < 5 * (2 / 4000) ** 0.5


def test_a_saved_fit_needs_the_data_again(make_problem, tmp_path):
    problem = make_problem()
    fitted = fit(problem, "matrix_free_dual")
    fitted.save(tmp_path / "fit.safetensors")
    options = {"prior_precision": problem.delta, "inverse": "matrix_free_dual"}
    loaded = LinearizedLaplace(problem.model, problem.likelihood, **options)
    loaded.load(tmp_path / "fit.safetensors")
    with pytest.raises(NotFittedError, match=r"attach"):
        loaded.variance(problem.query)
    loaded.attach_data(problem.loader)
    assert torch.equal(loaded.variance(problem.query), fitted.variance(problem.query))


class Turning:
    """Its batches in the other direction at every pass."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        self.batches = self.batches[::-1]
        return iter(self.batches)


def test_rows_in_another_order_are_rejected(make_problem, monkeypatch):
    problem = make_problem()
    monkeypatch.setattr("estimators.data.training_data._CACHE_BYTES", 0)
    loader = Turning(problem.loader)
    options = {"prior_precision": problem.delta, "inverse": "matrix_free_dual"}
    with pytest.raises(NonDeterministicError, match=r"same order.*does not shuffle"):
        LinearizedLaplace(problem.model, problem.likelihood, **options).fit(loader).variance(problem.query)


def test_it_is_taken_where_neither_rows_nor_matrix_fit(make_problem, monkeypatch):
    at_two_places = (nn.Unflatten(1, (2, 2)), nn.Linear(2, 90), nn.Tanh(), nn.Flatten(), nn.Linear(180, 3))
    problem = make_problem(model=nn.Sequential(*at_two_places), n=5)
    monkeypatch.setattr(matrix_free_dual, "_KEPT_BYTES", 2**10)
    monkeypatch.setattr("estimators.objective.objective.available_bytes", lambda _: 2**17)
    assert fit(problem, "auto").inverse_ == "matrix_free_dual"


def test_what_it_cannot_do_is_rejected(make_problem, monkeypatch):
    problem = make_problem()
    with pytest.raises(OptionError, match=r"positive prior_precision"):
        fit(problem, "matrix_free_dual", prior_precision={"*.bias": 0.0, "*": 2.0})
    with pytest.raises(OptionError, match=r"hessian"):
        fit(problem, "matrix_free_dual", curvature="hessian")
    monkeypatch.setattr("estimators.runtime.memory.available_bytes", lambda _: 1000)
    with pytest.raises(TooLargeError, match=r"outputs of all rows"):
        fit(problem, "matrix_free_dual")
