"""Likelihoods: normalised densities, their derivatives by autograd, and what they reject."""

import pytest
import torch
from torch.func import grad, hessian, vmap

from estimators import Bernoulli, Categorical, Gaussian
from estimators.errors import DataError, OptionError
from estimators.likelihoods import resolve_likelihood

B, C = 5, 3
SIGMAS = torch.tensor([0.3, 1.4, 2.2], dtype=torch.float64)
ALL = [Gaussian(0.7), Gaussian(SIGMAS), Categorical(), Bernoulli()]
every = pytest.mark.parametrize("likelihood", ALL, ids=["gaussian", "gaussian per output", "categorical", "bernoulli"])


def outputs(seed=0):
    return 2 * torch.randn(B, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def targets(likelihood):
    if likelihood.kind == "classification":
        return torch.tensor([0, 2, 1, 1, 2])
    y = outputs(seed=1)
    return y if likelihood.kind == "regression" else (y > 0).double()


def one_row(of, f):
    """f -> of(f) of a single row (C,)."""
    return of(f[None])[0]


@every
def test_nll_is_minus_the_log_density_of_torch_distributions(likelihood):
    f, y = outputs(), targets(likelihood)
    sigma = torch.as_tensor(getattr(likelihood, "sigma_noise", 1.0), dtype=torch.float64)
    distributions = {
        "regression": lambda: torch.distributions.Normal(f, sigma).log_prob(y).sum(1),
        "classification": lambda: torch.distributions.Categorical(logits=f).log_prob(y),
        "binary": lambda: torch.distributions.Bernoulli(logits=f).log_prob(y).sum(1),
    }
    assert torch.allclose(likelihood.nll(f, y), -distributions[likelihood.kind](), rtol=1e-12)


@every
def test_lambda_is_the_second_derivative_of_nll(likelihood):
    f, y = outputs(), targets(likelihood)
    second = vmap(hessian(lambda row, target: likelihood.nll(row[None], target[None])[0]))(f, y)
    assert torch.allclose(likelihood.hessian(f), second, atol=1e-12)


@every
def test_s_times_its_transpose_is_lambda(likelihood):
    f = outputs()
    root = likelihood.hessian_sqrt(f)
    assert torch.allclose(root @ root.transpose(1, 2), likelihood.hessian(f), atol=1e-12)


@every
def test_products_are_those_of_the_matrices(likelihood):
    f = outputs()
    v = torch.randn(2, B, C, dtype=torch.float64)
    for product, matrix in (
        (likelihood.hessian_product, likelihood.hessian(f)),
        (likelihood.root_product, likelihood.hessian_sqrt(f)),
    ):
        assert torch.allclose(product(f, v), torch.einsum("bcd,kbd->kbc", matrix, v), atol=1e-12)


@every
def test_the_diagonal_is_that_of_lambda(likelihood):
    f = outputs()
    diagonal = likelihood.hessian(f).diagonal(dim1=1, dim2=2)
    assert torch.allclose(likelihood.hessian_diagonal(f), diagonal, atol=1e-14)


@every
def test_the_sum_over_rows_is_that_of_lambda(likelihood):
    f = outputs()
    assert torch.allclose(likelihood.hessian_sum(f), likelihood.hessian(f).sum(0), atol=1e-12)


@every
def test_the_networks_own_predictions_are_a_stationary_target(likelihood):
    f = outputs()
    slope = grad(lambda g: likelihood.expected_nll(g, f).sum())(f)
    assert float(slope.abs().max()) < 1e-14


@every
def test_the_hessian_of_expected_nll_at_its_reference_is_lambda(likelihood):
    f = outputs()
    second = vmap(hessian(lambda row, ref: likelihood.expected_nll(row[None], ref[None])[0]))(f, f)
    assert torch.allclose(second, likelihood.hessian(f), atol=1e-12)


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli()])
def test_expected_nll_is_the_mean_of_nll_over_the_labels_that_the_reference_predicts(likelihood):
    f, ref = outputs()[:, :2], outputs(seed=2)[:, :2]
    if likelihood.kind == "classification":
        p = ref.softmax(1)
        mean = sum(p[:, c] * likelihood.nll(f, torch.full((B,), c)) for c in range(2))
    else:
        p = ref.sigmoid()
        weighted = [
            (p if label else 1 - p)[:, c] * likelihood.nll(f[:, c : c + 1], torch.full((B, 1), float(label)))
            for c in range(2)
            for label in (0, 1)
        ]
        mean = sum(weighted)
    assert torch.allclose(likelihood.expected_nll(f, ref), mean, rtol=1e-12)


def test_gaussian_expected_nll_differs_from_its_mean_by_a_constant_alone():
    likelihood, ref = Gaussian(SIGMAS), outputs(seed=2)
    # E[nll] over y ~ N(ref, σ²) = nll(f, ref) + C/2
    difference = [likelihood.nll(f, ref) - likelihood.expected_nll(f, ref) for f in (outputs(), outputs(seed=4))]
    assert torch.allclose(difference[0], difference[1], rtol=1e-12)


@every
def test_score_noise_has_covariance_lambda(likelihood):
    f = outputs()[:1]
    v = torch.randn(40_000, 1, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = likelihood.root_product(f, v)[:, 0]
    exact = likelihood.hessian(f)[0]
    assert torch.allclose(noise.T @ noise / len(v), exact, atol=0.05 * float(exact.abs().max()))


@every
def test_extreme_logits_stay_finite(likelihood):
    f = torch.tensor([[800.0, -800.0, 0.0]], dtype=torch.float64)
    y = targets(likelihood)[:1]
    for value in (
        likelihood.nll(f, y),
        likelihood.hessian(f),
        likelihood.hessian_sqrt(f),
        likelihood.expected_nll(f, f),
    ):
        assert bool(torch.isfinite(value).all())


@pytest.mark.parametrize(
    ("name", "kind"), [("regression", Gaussian), ("classification", Categorical), ("binary", Bernoulli)]
)
def test_a_string_stands_for_a_likelihood(name, kind):
    assert isinstance(resolve_likelihood(name), kind)


def test_an_object_stands_for_itself():
    likelihood = Gaussian(0.2)
    assert resolve_likelihood(likelihood) is likelihood


def test_an_unknown_likelihood_is_rejected_with_the_known_ones():
    with pytest.raises(OptionError, match=r"classification.*'poisson'"):
        resolve_likelihood("poisson")


@pytest.mark.parametrize(
    "sigma", [0.0, -1.0, float("nan"), float("inf"), torch.tensor([1.0, 0.0]), torch.ones(2, 2)], ids=repr
)
def test_a_standard_deviation_that_is_none_is_rejected(sigma):
    with pytest.raises(OptionError, match="sigma_noise > 0"):
        Gaussian(sigma)


def test_one_sigma_per_output_must_match_the_outputs():
    with pytest.raises(DataError, match=r"3 outputs.*2 of them"):
        Gaussian(torch.tensor([1.0, 2.0])).nll(outputs(), outputs())


@pytest.mark.parametrize(
    ("likelihood", "y", "message"),
    [
        (Gaussian(), torch.zeros(B), r"\(5, 3\).*\(5,\)"),
        (Gaussian(), torch.zeros(B, 1).double(), r"\(5, 3\).*\(5, 1\)"),
        (Gaussian(), torch.zeros(B, C), "float64.*float32"),
        (Gaussian(), torch.zeros(B, C, dtype=torch.int64), "float64.*int64"),
        (Categorical(), torch.zeros(B), "integer.*float32"),
        (Categorical(), torch.zeros(B, dtype=torch.bool), "integer.*bool"),
        (Categorical(), torch.zeros(B, 1, dtype=torch.int64), r"\(5, 1\)"),
        (Categorical(), torch.tensor([0, 1, 2, 3, 0]), "0..2.*0 to 3"),
        (Categorical(), torch.tensor([0, 1, 2, -10, 0]), "0..2.*-10 to 2"),
        (Categorical(ignore_index=-1), torch.tensor([0, 1, -1, -100, 0]), "0..2.*-100 to 1"),
        (Bernoulli(), torch.zeros(B), r"\(5, 3\).*\(5,\)"),
        (Bernoulli(), torch.full((B, C), 1.5), "0 or 1.*1.5"),
        (Bernoulli(), torch.full((B, C), -1), "0 or 1.*-1"),
    ],
)
def test_targets_that_do_not_fit_are_rejected_with_what_was_received(likelihood, y, message):
    with pytest.raises(DataError, match=f"{message}.*Try: "):
        likelihood.check_targets(outputs(), y)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32, torch.float64])
def test_binary_labels_of_any_dtype_count_alike(dtype):
    y = targets(Bernoulli()).to(dtype)
    Bernoulli().check_targets(outputs(), y)
    assert torch.equal(Bernoulli().nll(outputs(), y), Bernoulli().nll(outputs(), y.double()))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8])
def test_class_indices_of_any_integer_type_count_alike(dtype):
    y = targets(Categorical())
    Categorical().check_targets(outputs(), y.to(dtype))
    assert torch.equal(Categorical().nll(outputs(), y.to(dtype)), Categorical().nll(outputs(), y))
