"""A dense, slow reference that shares no code with `estimators`.

L(θ) = Σ −log p(y | f(x; θ)) + ½ Σ δ (θ − θ₀)²           "hessian": ∇²L(θ̂), forward over reverse
L_lin(θ) = Σ −log p(y | f̂ + J(θ − θ̂)) + ½ Σ δ (θ − θ₀)²   "ggn": ∇²L_lin(θ̂), of the linearised network
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["DenseReference"]

_COLUMNS = 128
"""Columns of A that are computed at once."""

Inputs: TypeAlias = Any  # a tensor, or a dict of tensors for the network's keywords
Rows = Sequence[tuple[Inputs, Tensor]]


@dataclass(frozen=True)
class DenseReference:
    """J, A and J A⁻¹ Jᵀ over the named parameters of a model.

    Args:
        model: in eval mode, outputs (B, C).
        batches: training rows as (x, y).
        names: of the parameters, P numbers in all.
        kind: "regression", "classification" or "binary".
        sigma: standard deviation of the noise of regression, a number or one per output.
        delta: prior precision, a number or a mapping {glob of parameter names: number}; the first match counts.
        prior_mean: θ₀.
    """

    model: nn.Module
    batches: Rows
    names: Sequence[str]
    kind: str
    sigma: float | Tensor = 1.0
    delta: float | Mapping[str, float] = 1.0
    prior_mean: float = 0.0

    @property
    def theta(self) -> Tensor:
        """The trained weights θ̂, (P,)."""
        return torch.cat([p.detach().reshape(-1) for p in self._parameters()])

    def covariance(self, x: Inputs, curvature: str) -> Tensor:
        """Return J A⁻¹ Jᵀ at x, (M, C, C)."""
        jacobian = self.jacobian(x)
        solved = torch.linalg.solve(self.precision(curvature), jacobian.flatten(0, 1).T)  # A⁻¹ Jᵀ
        return torch.einsum("mcp,pmd->mcd", jacobian, solved.reshape(-1, *jacobian.shape[:2]))

    def precision(self, curvature: str) -> Tensor:
        """Return A of the curvature "ggn" or "hessian", (P, P)."""
        energy = self.energy if curvature == "hessian" else self._linearised_energy()
        slope, theta = grad(energy), self.theta

        def column(v: Tensor) -> Tensor:  # v → H v
            image: Tensor = jvp(slope, (theta,), (v,))[1]
            return image

        with _plain_kernels(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # forward mode compiles its rules with a call that torch deprecates
            matrix = vmap(column, chunk_size=_COLUMNS)(torch.eye(len(theta), dtype=theta.dtype))
        return 0.5 * (matrix + matrix.T).detach()

    def gradient(self) -> Tensor:
        """Return ∇L(θ̂), (P,)."""
        with _plain_kernels():
            slope: Tensor = grad(self.energy)(self.theta)
        return slope.detach()

    def energy(self, theta: Tensor) -> Tensor:
        """Return L(θ)."""
        data = [self._nll(self._outputs(theta, x), y) for x, y in self.batches]
        return torch.stack(data).sum() + self._prior(theta)

    def outputs(self, x: Inputs) -> Tensor:
        """Return f(x; θ̂), (M, C)."""
        return self._outputs(self.theta, x).detach()

    def jacobian(self, x: Inputs) -> Tensor:
        """Return ∂f/∂θ at θ̂, (M, C, P), by one backward pass per row and output."""
        theta = self.theta.requires_grad_()
        with _plain_kernels(), torch.enable_grad():
            f = self._outputs(theta, x)
            rows = [torch.autograd.grad(value, theta, retain_graph=True)[0] for value in f.reshape(-1)]
        return torch.stack(rows).reshape(*f.shape, -1)

    def delta_vector(self) -> Tensor:
        """Return δ of each weight, (P,)."""
        if not isinstance(self.delta, Mapping):
            return torch.full_like(self.theta, self.delta)
        parts = []
        for name, p in zip(self.names, self._parameters(), strict=True):
            value = next(number for glob, number in self.delta.items() if fnmatchcase(name, glob))
            parts.append(torch.full((p.numel(),), value, dtype=p.dtype))
        return torch.cat(parts)

    def _linearised_energy(self) -> Callable[[Tensor], Tensor]:
        centre = self.theta
        lines = [(self.outputs(x), self.jacobian(x), y) for x, y in self.batches]

        def energy(theta: Tensor) -> Tensor:
            data = [self._nll(f + torch.einsum("ncp,p->nc", j, theta - centre), y) for f, j, y in lines]
            return torch.stack(data).sum() + self._prior(theta)

        return energy

    def _nll(self, f: Tensor, y: Tensor) -> Tensor:
        if self.kind == "regression":
            sigma = torch.as_tensor(self.sigma, dtype=f.dtype)
            return 0.5 * ((y - f) ** 2 / sigma**2 + torch.log(2 * math.pi * sigma**2)).sum()
        if self.kind == "classification":
            return -(f - f.logsumexp(-1, keepdim=True)).gather(1, y[:, None]).sum()
        return -(y * f - torch.log1p(torch.exp(-f.abs())) - f.clamp_min(0)).sum()  # y log s(f) + (1−y) log s(−f)

    def _prior(self, theta: Tensor) -> Tensor:
        return 0.5 * (self.delta_vector() * (theta - self.prior_mean) ** 2).sum()

    def _outputs(self, theta: Tensor, x: Inputs) -> Tensor:
        shapes = [p.shape for p in self._parameters()]
        parts = theta.split([shape.numel() for shape in shapes])
        state = {n: part.reshape(shape) for n, part, shape in zip(self.names, parts, shapes, strict=True)}
        for name, p in self.model.named_parameters():
            state.setdefault(name, p.detach())
        arguments, keywords = ((), x) if isinstance(x, dict) else ((x,), {})
        output = functional_call(self.model, state, arguments, keywords)
        tensor: Tensor = output if isinstance(output, Tensor) else output.logits
        return tensor

    def _parameters(self) -> list[nn.Parameter]:
        found = dict(self.model.named_parameters())
        return [found[name] for name in self.names]


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Attention as plain matrix products: the fused kernels have no forward mode."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
