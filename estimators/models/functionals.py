"""Functions g of a row's outputs whose variance is wanted: a margin, a mean over pixels, the tokens that were chosen.

By the delta method the variance of g(f(x)) is that of a network g∘f with Jacobian G J, G = ∂g/∂f: estimators read it
through that network, and no covariance between all outputs is made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev

from estimators.models.network import Network
from estimators.models.self_check import Disagreement
from estimators.numerics.pytrees import PyTree, plain_inputs, select_rows
from estimators.numerics.vectorize import over_rows

__all__ = ["ComposedNetwork", "Functional", "next_token_log_probs", "next_token_logits"]

Functional = Callable[..., Tensor]
"""g(outputs of one row) or g(outputs of one row, inputs of that row) -> a scalar or a tensor; differentiable."""


class ComposedNetwork(Network):
    """g∘f in place of f: rows (B, D), D counting what g returns.

    Where the derivatives of g∘f disagree with plain autograd, they are G times those of f.
    """

    def __init__(self, network: Network, of: Functional) -> None:
        self.module, self.subset, self.theta, self.frozen = (
            network.module,
            network.subset,
            network.theta,
            network.frozen,
        )
        self.pass_counter, self.result_dtype, self._stored = network.pass_counter, network.result_dtype, network._stored
        self.check = network.check.for_function()
        self.routes = replace(network.routes, first=dict(network.routes.first))
        self.base, self.of, self._reads_inputs = network, of, _n_arguments(of) > 1

    def shaped(self, params: dict[str, Tensor], x: PyTree) -> Tensor:
        return self._values(super().shaped(params, x), x)

    def shaped_outputs(self, x: PyTree) -> Tensor:
        return self._values(super().shaped_outputs(x), x)

    def _values(self, f: Tensor, x: PyTree) -> Tensor:
        values: Tensor = over_rows(self._value, f, x) if self._reads_inputs else over_rows(self._value, f)
        return values

    def slopes(self, x: PyTree, *, at: Tensor | None = None) -> Tensor:
        """G at each row, (B, D, C): at the outputs of the network, or at others (B, C)."""
        f = self.base.shaped_outputs(x)
        f = f if at is None else at.reshape(f.shape)
        rows = (f, x) if self._reads_inputs else (f,)
        slopes: Tensor = over_rows(jacrev(self._value), *rows).flatten(2)
        u = self.check.random(slopes[..., 0])
        expected = self._pulled_through(x, f, u)
        apart = (torch.einsum("bd,bdc->bc", u, slopes) - expected).abs().max() if len(f) else slopes.new_zeros(())
        if float(apart) <= self.check.tolerance() * float(expected.abs().max()):
            return slopes
        d = range(slopes.shape[1])
        picks = [torch.eye(len(d), dtype=f.dtype, device=f.device)[i].expand(len(f), -1) for i in d]
        return torch.stack([self._pulled_through(x, f, pick) for pick in picks], dim=1)

    def _pulled_through(self, x: PyTree, f: Tensor, u: Tensor) -> Tensor:
        """Gᵀu (B, C) for u (B, D), by plain autograd row by row."""
        with torch.enable_grad():
            leaf = f.detach().clone().requires_grad_()
            rows = [self._value(leaf[i], *self._inputs_of(x, i)) for i in range(len(leaf))]
            (pulled,) = torch.autograd.grad(torch.stack(rows), leaf, u, allow_unused=True)
        return torch.zeros_like(f).flatten(1) if pulled is None else pulled.flatten(1)

    def _inputs_of(self, x: PyTree, i: int) -> tuple[PyTree, ...]:
        return (select_rows(x, i),) if self._reads_inputs else ()

    def _two_reverse_passes(self, x: PyTree, vectors: Tensor) -> Tensor:
        return torch.einsum("bdc,kbc->kbd", self.slopes(x), super()._two_reverse_passes(x, vectors))

    def _own_rows(self, x: PyTree) -> Tensor:
        return self.slopes(x) @ super()._own_rows(x)

    def _own_pull(self, x: PyTree, cotangents: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        values = self.outputs(x)
        u = torch.einsum("bdc,kbd->kbc", self.slopes(x), cotangents(values))
        return values, super()._own_pull(x, lambda _: u)[1]

    def slope_error(self, x: PyTree, u: Tensor, product: Tensor, names: Sequence[str] | None = None) -> Disagreement:
        return super().slope_error(x, self._pulled_through(x, self.base.shaped_outputs(x), u), product, names)

    def _along_error(self, x: PyTree, u: Tensor, along: Tensor, r: Tensor) -> Disagreement:
        through = self._pulled_through(x, self.base.shaped_outputs(x), u)
        return self.check.along_error(x, through, along, r, u=u)

    def _value(self, f: Tensor, *x: PyTree) -> Tensor:
        return self.of(f, *map(plain_inputs, x)).flatten()


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
