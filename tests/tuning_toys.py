"""Toys whose best prior precision lies inside a grid, and linearized Laplace of them by hand, in numpy."""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import nn

from estimators import Gaussian, LinearizedLaplace
from estimators.runtime.rng import preserved_random_state
from estimators.training import Recipe, train_map

__all__ = ["SIGMA", "Toy", "laplace", "toy"]

SIGMA = 0.4


@dataclass(frozen=True)
class Toy:
    """An overfitted tanh network, its rows in ragged batches, and the dense posterior."""

    kind: str
    model: nn.Module
    x: np.ndarray
    y: np.ndarray
    x_val: np.ndarray
    y_val: np.ndarray
    delta: float

    @property
    def likelihood(self):
        return Gaussian(SIGMA) if self.kind == "regression" else self.kind

    @property
    def train(self):
        return _batches(self.x, self.y, 9)

    @property
    def validation(self):
        return _batches(self.x_val, self.y_val, 7)

    def outputs_and_jacobian(self, x):
        """f (M, C) and ∂f/∂θ (M, C, P) of f = W₂ tanh(W₁x + b₁) + b₂."""
        w1, b1, w2, b2 = (p.detach().numpy() for p in self.model.parameters())
        hidden = np.tanh(x @ w1.T + b1)
        slope = np.einsum("ch,nh->nch", w2, 1 - hidden**2)  # ∂f/∂(W₁x + b₁)
        eye = np.broadcast_to(np.eye(len(b2)), (len(x), len(b2), len(b2)))
        parts = [np.einsum("nch,nd->nchd", slope, x), slope, np.einsum("nck,nh->nckh", eye, hidden), eye]
        return hidden @ w2.T + b2, np.concatenate([part.reshape(len(x), len(b2), -1) for part in parts], axis=2)

    def precision(self, delta, sigma=SIGMA):
        """GGN + δ."""
        f, jacobian = self.outputs_and_jacobian(self.x)
        if self.kind == "regression":
            ggn = np.einsum("ncp,ncq->pq", jacobian, jacobian) / sigma**2
        else:
            p = softmax(f)
            root = np.sqrt(p)[:, :, None] * np.eye(p.shape[1]) - p[:, :, None] * np.sqrt(p)[:, None, :]
            rows = np.einsum("nck,ncp->nkp", root, jacobian)
            ggn = np.einsum("nkp,nkq->pq", rows, rows)
        return ggn + delta * np.eye(jacobian.shape[2])

    def score(self, delta, scale=1.0, other=1.0, sigma=SIGMA):
        """Mean −log p(y) on the validation rows, the variance scaled, logits over `other` or σ times it."""
        f, jacobian = self.outputs_and_jacobian(self.x_val)
        inverse = np.linalg.inv(self.precision(delta, sigma))
        variance = scale * np.einsum("ncp,pq,ncq->nc", jacobian, inverse, jacobian)
        if self.kind == "regression":
            total = variance + (other * sigma) ** 2
            return (0.5 * (self.y_val - f) ** 2 / total + 0.5 * np.log(2 * np.pi * total)).sum(1).mean()
        p = softmax(f / other / np.sqrt(1 + math.pi / 8 * variance / other**2))
        return -np.log(p[np.arange(len(p)), self.y_val]).mean()

    def minus_evidence(self, delta):
        """−log ∫ p(D | θ) N(θ | 0, 1/δ) dθ, p(D, θ) to second order at θ̂ with the GGN."""
        f, _ = self.outputs_and_jacobian(self.x)
        theta = np.concatenate([p.detach().numpy().ravel() for p in self.model.parameters()])
        if self.kind == "regression":
            log_likelihood = -(0.5 * ((self.y - f) / SIGMA) ** 2 + np.log(SIGMA * np.sqrt(2 * np.pi))).sum()
        else:
            log_likelihood = np.log(softmax(f)[np.arange(len(f)), self.y]).sum()
        log_prior = 0.5 * len(theta) * np.log(delta / (2 * np.pi)) - 0.5 * delta * theta @ theta
        log_volume = 0.5 * len(theta) * np.log(2 * np.pi) - 0.5 * np.linalg.slogdet(self.precision(delta))[1]
        return -(log_likelihood + log_prior + log_volume)


@cache
def toy(kind):
    """Trained with a δ far below the one that validates best."""
    rng = np.random.default_rng(1)
    n, m, outputs = 50, 60, 3 if kind == "classification" else 2
    x = rng.normal(size=(n + m, 4))
    signal = 1.5 * x @ rng.normal(size=(4, outputs)) / 2
    if kind == "classification":
        y = (signal + rng.gumbel(size=signal.shape)).argmax(1)
    else:
        y = np.sin(signal) + SIGMA * rng.normal(size=signal.shape)
    wide = {"dtype": torch.float64}
    with preserved_random_state():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8, **wide), nn.Tanh(), nn.Linear(8, outputs, **wide))
        likelihood = Gaussian(SIGMA) if kind == "regression" else kind
        recipe = Recipe(epochs=150, lr=2e-2)
        train_map(model, likelihood, _batches(x[:n], y[:n], 9), prior_precision=0.02, recipe=recipe)
    return Toy(kind, model.eval(), x[:n], y[:n], x[n:], y[n:], 0.02)


def laplace(problem, **options):
    """Fitted to a toy, at the δ that it was trained with."""
    options = {"prior_precision": problem.delta, **options}
    return LinearizedLaplace(problem.model, problem.likelihood, **options).fit(problem.train)


def softmax(f):
    p = np.exp(f - f.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def _batches(x, y, size):
    return list(zip(torch.tensor(x).split(size), torch.tensor(y).split(size), strict=True))
