"""Functions g of the outputs of a row whose variance is wanted: a margin, a mean over pixels, the chosen tokens.

By the delta method the variance of g(f(x)) is that of a network g∘f with Jacobian G J, G = ∂g/∂f. Estimators compute it
from that network, without the covariance of all outputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev

from estimators.models.disagreement import Disagreement, relative_error
from estimators.models.network import Network
from estimators.numerics.pytrees import PyTree, plain_inputs, select_rows
from estimators.numerics.vectorize import over_rows

__all__ = ["ComposedNetwork", "Functional", "next_token_log_probs", "next_token_logits", "variance_by_covariance"]

Functional = Callable[..., Tensor]
"""g(outputs of one row) or g(outputs of one row, inputs of that row) -> a scalar or a tensor; differentiable."""


class ComposedNetwork(Network):
    """The network g∘f in place of f, with outputs (B, D), D counting what g returns.

    If the derivatives of g∘f disagree with plain autograd, G times those of f is used.

    Args:
        network: f.
        of: g, from the outputs of one row, in the model's shape, to a scalar or a tensor. If `of` has two parameters,
            the second receives the inputs of the row.

    Example:
        >>> import torch
        >>> network = Network(torch.nn.Linear(3, 2), ["weight", "bias"])
        >>> margin = ComposedNetwork(network, lambda f: f[0] - f[1])
        >>> margin.jacobian(torch.ones(5, 3)).shape
        torch.Size([5, 1, 8])
    """

    def __init__(self, network: Network, of: Functional) -> None:
        vars(self).update(vars(network))
        self.check = network.check.for_function()
        self.routes = replace(network.routes, first=dict(network.routes.first))
        self.base, self.of, self._reads_inputs = network, of, _n_arguments(of) > 1

    def shaped(self, params: dict[str, Tensor], x: PyTree) -> Tensor:
        return self._values(super().shaped(params, x), x)

    def shaped_outputs(self, x: PyTree) -> Tensor:
        return self._values(super().shaped_outputs(x), x)

    def _values(self, f: Tensor, x: PyTree) -> Tensor:
        """g at outputs f (B, ...), (B, D)."""
        values: Tensor = over_rows(self._value, f, x) if self._reads_inputs else over_rows(self._value, f)
        return values

    def _value(self, f: Tensor, *x: PyTree) -> Tensor:
        """g at the outputs f (...) of one row, flat (D,)."""
        return self.of(f, *map(plain_inputs, x)).flatten()

    def function_jacobian(self, x: PyTree, *, at: Tensor | None = None) -> Tensor:
        """Compute G = ∂g/∂f, compared with plain autograd and replaced by it if they disagree.

        Args:
            x: inputs of B rows.
            at: outputs (B, C) to differentiate at; None for those of the network.

        Returns:
            G (B, D, C).
        """
        f = self.base.shaped_outputs(x)
        f = f if at is None else at.reshape(f.shape)
        rows = (f, x) if self._reads_inputs else (f,)
        jacobian: Tensor = over_rows(jacrev(self._value), *rows).flatten(2)
        u = self.check.random(jacobian[..., 0])
        expected = self._function_vjp(x, f, u)
        difference = torch.einsum("bd,bdc->bc", u, jacobian) - expected
        error, scale = (float(t.abs().max()) if len(f) else 0.0 for t in (difference, expected))
        if relative_error(error, scale) <= self.check.tolerance():
            return jacobian
        unit = torch.eye(jacobian.shape[1], dtype=f.dtype, device=f.device)
        return torch.stack([self._function_vjp(x, f, e.expand(len(f), -1)) for e in unit], dim=1)

    def _function_vjp(self, x: PyTree, f: Tensor, u: Tensor) -> Tensor:
        """Gᵀu (B, C) for u (B, D), by plain autograd row by row."""
        with torch.enable_grad():
            leaf = f.detach().clone().requires_grad_()
            inputs = [(select_rows(x, i),) if self._reads_inputs else () for i in range(len(leaf))]
            rows = [self._value(row, *of_row) for row, of_row in zip(leaf, inputs, strict=True)]
            (product,) = torch.autograd.grad(torch.stack(rows), leaf, u, allow_unused=True)
        return torch.zeros_like(f).flatten(1) if product is None else product.flatten(1)

    def _two_reverse_passes(self, x: PyTree, vectors: Tensor) -> Tensor:
        """G J v by two reverse passes for J v."""
        return torch.einsum("bdc,kbc->kbd", self.function_jacobian(x), super()._two_reverse_passes(x, vectors))

    def _plain_rows(self, x: PyTree) -> Tensor:
        """G J (B, D, P) by plain autograd for J."""
        return self.function_jacobian(x) @ super()._plain_rows(x)

    def _plain_vjp(self, x: PyTree, cotangents: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """g(f) (B, D) and (G J)ᵀ u (K, P) by plain autograd."""
        values = self.outputs(x)
        u = torch.einsum("bdc,kbd->kbc", self.function_jacobian(x), cotangents(values))
        return values, super()._plain_vjp(x, lambda _: u)[1]

    def gradient_error(self, x: PyTree, u: Tensor, product: Tensor, names: Sequence[str] | None = None) -> Disagreement:
        cotangent = self._function_vjp(x, self.base.shaped_outputs(x), u)
        return super().gradient_error(x, cotangent, product, names)

    def _directional_error(self, x: PyTree, u: Tensor, jvp: Tensor, r: Tensor) -> Disagreement:
        """The error of ⟨u, G J r⟩ against ⟨Jᵀ(Gᵀu), r⟩ by plain autograd."""
        cotangent = self._function_vjp(x, self.base.shaped_outputs(x), u)
        return self.check.directional_error(x, cotangent, jvp, r, u=u)


def _n_arguments(of: Functional) -> int:
    """How many arguments without a default `of` takes; 1 if it has no signature."""
    try:
        parameters: Any = inspect.signature(of).parameters.values()
    except ValueError:
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters)


def next_token_logits(logits: Tensor, x: PyTree) -> Tensor:
    """Return the logit that a causal language model gives to each following token.

    Args:
        logits: outputs of one row, (T, V) over a vocabulary of V tokens.
        x: inputs of the row, a mapping with "input_ids" (T,) and, optionally, "attention_mask" (T,).

    Returns:
        (T − 1,); 0 if "attention_mask" marks the following token as padding.
    """
    return _at_next_tokens(logits, x)


def next_token_log_probs(logits: Tensor, x: PyTree) -> Tensor:
    """Return the log-probability that a causal language model gives to each following token.

    Args:
        logits: outputs of one row, (T, V) over a vocabulary of V tokens.
        x: inputs of the row, a mapping with "input_ids" (T,) and, optionally, "attention_mask" (T,).

    Returns:
        (T − 1,), in nats; 0 if "attention_mask" marks the following token as padding.
    """
    return _at_next_tokens(logits.log_softmax(-1), x)


def _at_next_tokens(scores: Tensor, x: PyTree) -> Tensor:
    """The score (T − 1,) at each position of the token that follows, from scores (T, V)."""
    chosen = scores[:-1].gather(-1, x["input_ids"][1:, None])[:, 0]
    mask = x.get("attention_mask")
    return chosen if mask is None else chosen * mask[1:]


def variance_by_covariance(jacobian: Tensor, covariance: Tensor) -> Tensor:
    """diag(G Σ Gᵀ) (M, D) of a function's Jacobian G (M, D, C) and the covariance Σ (M, C, C) of the outputs.

    The result has the dtype of Σ, which may be larger than that of the network.
    """
    jacobian = jacobian.to(covariance.dtype)
    return torch.einsum("mdc,mce,mde->md", jacobian, covariance, jacobian)
