"""Last-layer Laplace where the layer is used at every token: the closed form against the linearized network."""

import pytest
import torch
from torch import nn

from estimators import Categorical, Gaussian, LastLayerLaplace, LinearizedLaplace
from estimators.errors import UnsupportedError
from estimators.likelihoods import CausalTokens

DELTA, WORDS, PLACES = 2.5, 5, 6


class Reader(nn.Module):
    """(B, T) -> (B, T, V); only the head is trained."""

    def __init__(self, *, classes_first=False):
        super().__init__()
        self.words, self.head, self.classes_first = nn.Embedding(WORDS, 3), nn.Linear(3, WORDS), classes_first

    def forward(self, tokens):
        logits = self.head(torch.tanh(self.words(tokens).cumsum(1)))
        return logits.transpose(1, 2) if self.classes_first else logits


def tokens(n=11):
    return torch.randint(0, WORDS, (n, PLACES), generator=torch.Generator().manual_seed(n))


def batches(likelihood):
    """Rows of which every third ends in padding."""
    x = tokens()
    y = x.clone()
    y[::3, 4:] = -100
    if isinstance(likelihood, Gaussian):
        y = torch.randn(*x.shape, WORDS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return list(zip(x.split(4), y.split(4), strict=True))


@pytest.fixture
def model():
    return Reader().double().eval()


likelihoods = pytest.mark.parametrize("likelihood", [CausalTokens(), Categorical(), Gaussian(sigma_noise=0.6)])


@likelihoods
@pytest.mark.parametrize("structure", ["full", "diag"])
def test_it_is_the_linearized_laplace_of_the_last_layer(likelihood, structure, model):
    options = {"prior_precision": DELTA, "hessian_structure": structure}
    closed = LastLayerLaplace(model, likelihood, **options).fit(batches(likelihood))
    inverse = {"inverse": "cholesky"} if structure == "full" else {}
    other = LinearizedLaplace(model, likelihood, subset_of_weights="last_layer", **options, **inverse)
    other.fit(batches(likelihood))
    x = tokens(3)
    assert closed.variance(x).shape == (3, PLACES, WORDS)
    assert torch.allclose(closed.variance(x), other.variance(x), rtol=1e-8)
    assert torch.allclose(closed.log_marginal_likelihood(), other.log_marginal_likelihood(), rtol=1e-9)


def test_the_kronecker_form_has_means_and_sums_over_tokens_with_a_label(model):
    fitted = LastLayerLaplace(model, "causal_lm", prior_precision=DELTA, hessian_structure="kron")
    fitted.fit(batches(CausalTokens()))

    def features(x):
        with torch.no_grad():
            phi = torch.tanh(model.words(x).cumsum(1))
        return torch.cat([phi, torch.ones(*phi.shape[:2], 1, dtype=torch.float64)], dim=-1)

    hessians, gram = [], torch.zeros(4, 4, dtype=torch.float64)
    for x, y in batches(CausalTokens()):
        p, phi = model(x).softmax(-1).detach(), features(x)
        for b in range(len(x)):
            for t in range(PLACES - 1):
                if y[b, t + 1] != -100:
                    hessians.append(p[b, t].diag() - torch.outer(p[b, t], p[b, t]))
                    gram += torch.outer(phi[b, t], phi[b, t])
    eye = torch.eye(WORDS * 4, dtype=torch.float64)
    covariance = torch.linalg.inv(torch.kron(torch.stack(hessians).mean(0), gram) + DELTA * eye)
    x = tokens(3)
    jacobian = torch.einsum("cd,mte->mtcde", torch.eye(WORDS, dtype=torch.float64), features(x)).flatten(-2)
    by_hand = torch.einsum("mtcp,pq,mtcq->mtc", jacobian, covariance, jacobian)
    assert torch.allclose(fitted.variance(x), by_hand, rtol=1e-8)


def test_samples_have_its_mean_and_variance(model):
    fitted = LastLayerLaplace(model, "causal_lm", prior_precision=DELTA).fit(batches(CausalTokens()))
    x = tokens(2)
    samples = fitted.sample(x, 20_000, seed=1)
    assert samples.shape == (20_000, 2, PLACES, WORDS)
    with torch.no_grad():
        assert torch.allclose(samples.mean(0), model(x), atol=0.03)
    assert torch.allclose(samples.var(0), fitted.variance(x), rtol=0.06)
    prediction = fitted.predict(x, link_approx="mc", n_samples=50)
    assert prediction.probs.shape == (2, PLACES, WORDS)


def test_padding_is_in_no_curvature(model):
    loader = batches(CausalTokens())
    changed = [(torch.where(y == -100, (x + 1) % WORDS, x), y) for x, y in loader]  # it comes last
    first, second = (
        LastLayerLaplace(model, "causal_lm", prior_precision=DELTA).fit(rows).variance(tokens(3))
        for rows in (loader, changed)
    )
    assert torch.allclose(first, second, rtol=1e-12)


def test_what_has_no_closed_form_is_rejected(model):
    fitted = LastLayerLaplace(model, "causal_lm", prior_precision=DELTA).fit(batches(CausalTokens()))
    with pytest.raises(UnsupportedError, match=r"features of shape \(B, D\)"):
        fitted.covariance(tokens(3))
