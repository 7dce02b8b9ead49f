"""Functions g of a row's outputs whose variance is wanted: a margin, a mean over pixels, the tokens that were chosen.

By the delta method the variance of g(f(x)) is that of a network g∘f with Jacobian G J, G = ∂g/∂f: estimators read it
through that network, and no covariance between all outputs is made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev

from estimators.network import Network
from estimators.pytrees import PyTree
from estimators.vectorise import over_rows

__all__ = ["Functional", "Through", "next_token_log_probs", "next_token_logits"]

Functional = Callable[..., Tensor]
"""g(outputs of one row) or g(outputs of one row, inputs of that row) -> a scalar or a tensor; differentiable."""


class Through(Network):
    """g∘f in place of f: rows (B, D), D counting what g returns."""

    def __init__(self, network: Network, of: Functional) -> None:
        self.module, self.subset, self.theta, self.frozen = (
            network.module,
            network.subset,
            network.theta,
            network.frozen,
        )
        self.ledger = network.ledger
        self.of, self._reads_inputs = of, _n_arguments(of) > 1

    def shaped(self, pieces: dict[str, Tensor], x: PyTree) -> Tensor:
        f = super().shaped(pieces, x)
        values: Tensor = over_rows(self._value, f, x) if self._reads_inputs else over_rows(self._value, f)
        return values

    def slopes(self, x: PyTree, *, at: Tensor | None = None) -> Tensor:
        """G at each row, (B, D, C): at the outputs of the network, or at others (B, C)."""
        f = Network.shaped(self, self.pieces, x).detach()
        f = f if at is None else at.reshape(f.shape)
        rows = (f, x) if self._reads_inputs else (f,)
        slopes: Tensor = over_rows(jacrev(self._value), *rows)
        return slopes.flatten(2)

    def _value(self, f: Tensor, *x: PyTree) -> Tensor:
        return self.of(f, *x).flatten()


def _n_arguments(of: Functional) -> int:
    """Arguments without a default that `of` takes; 1 where it does not say."""
    try:
        parameters: Any = inspect.signature(of).parameters.values()
    except ValueError:
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters)


def next_token_logits(logits: Tensor, x: PyTree) -> Tensor:
    """Of a causal language model: the logit that each place gives to the token that follows, (T − 1,).

    `x` has "input_ids" (T,), and 0 stands where "attention_mask" says that the following token is padding.
    """
    return _following(logits, x)


def next_token_log_probs(logits: Tensor, x: PyTree) -> Tensor:
    """Likewise its log-probability, in nats."""
    return _following(logits.log_softmax(-1), x)


def _following(scores: Tensor, x: PyTree) -> Tensor:
    chosen = scores[:-1].gather(-1, x["input_ids"][1:, None])[:, 0]
    mask = x.get("attention_mask")
    return chosen if mask is None else chosen * mask[1:]


def variance_by_covariance(slopes: Tensor, covariance: Tensor) -> Tensor:
    """diag(G Σ Gᵀ), (M, D), of G (M, D, C) and Σ (M, C, C)."""
    return torch.einsum("mdc,mce,mde->md", slopes, covariance, slopes)
