"""The linearized posterior of any module, by plain autograd on the module itself: one backward pass an output.

Nothing here comes from `estimators`: J is what `backward` puts into `.grad`, A and its inverse are dense and float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

__all__ = ["Reference", "copied", "jacobian", "outputs", "reference"]


def copied(x):
    """The inputs on memory of their own: some networks write into them."""
    return {k: copied(v) for k, v in x.items()} if isinstance(x, Mapping) else x.clone()


def outputs(model: nn.Module, x) -> Tensor:
    """f (B, C) with its graph."""
    f = model(**x) if isinstance(x, Mapping) else model(x)
    if isinstance(f, Mapping):
        f = f["logits"]
    elif hasattr(f, "logits"):
        f = f.logits
    elif isinstance(f, tuple):
        f = f[0]
    return f.flatten(1)


def jacobian(model: nn.Module, x, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """f (B, C) and J (B, C, P) over the named parameters, all rows in one forward pass."""
    parameters = _parameters(model)
    chosen = [parameters[name] for name in names]
    f = outputs(model, copied(x))
    rows = []
    for out in f.flatten():
        for p in parameters.values():
            p.grad = None
        if out.requires_grad:
            out.backward(retain_graph=True)
        rows.append(torch.cat([_flat(torch.zeros_like(p) if p.grad is None else p.grad.detach()) for p in chosen]))
    for p in parameters.values():
        p.grad = None
    return f.detach().double(), torch.stack(rows).view(*f.shape, -1)


def _flat(gradient: Tensor) -> Tensor:
    """Real numbers in float64; a complex weight counts as its real and imaginary parts."""
    dense = gradient.to_dense()
    return (torch.view_as_real(dense) if dense.is_complex() else dense).flatten().double()


@dataclass(frozen=True)
class Reference:
    """Covariances (M, C, C) of the outputs at the queries, and what they came from."""

    covariance: Tensor
    jacobian: Tensor
    data: Tensor
    prior_precision: float
    theta: Tensor

    @property
    def variance(self) -> Tensor:
        """(M, C)."""
        return self.covariance.diagonal(dim1=1, dim2=2)

    @property
    def log_prior_minus_log_det(self) -> Tensor:
        """−½ δ‖θ̂‖² + ½ P log δ − ½ log|A|: the marginal likelihood without log p(D|θ̂)."""
        precision = self.data + self.prior_precision * torch.eye(len(self.data), dtype=torch.float64)
        prior = len(self.data) * math.log(self.prior_precision) - self.prior_precision * self.theta.square().sum()
        return 0.5 * (prior - torch.linalg.slogdet(precision)[1])

    @property
    def diagonal_variance(self) -> Tensor:
        """(M, C), of the diagonal of A alone."""
        return (self.jacobian.square() / (self.data.diagonal() + self.prior_precision)).sum(-1)


def reference(
    model: nn.Module,
    batches: Sequence,
    queries,
    likelihood: str,
    *,
    prior_precision: float,
    sigma: float,
    names: Sequence[str] | str = "*",
) -> Reference:
    """J A⁻¹ Jᵀ with A = Σ Jᵀ Λ J + δ I; Λ = I/σ² for regression, diag p − p pᵀ for classification."""
    if isinstance(names, str):
        names = [n for n, p in model.named_parameters() if p.requires_grad and fnmatchcase(n, names)]
    data: Tensor | float = 0.0
    for x in batches:
        f, j = jacobian(model, x, names)
        if likelihood == "regression":
            curvature = torch.eye(f.shape[1], dtype=f.dtype).expand(len(f), -1, -1) / sigma**2
        else:
            p = f.softmax(-1)
            curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        data = data + torch.einsum("ncp,ncd,ndq->pq", j, curvature, j)
    precision = data + prior_precision * torch.eye(len(data), dtype=torch.float64)
    _, j = jacobian(model, queries, names)
    solved = torch.linalg.solve(precision, j.flatten(0, 1).T).T.view_as(j)
    parameters = _parameters(model)
    theta = torch.cat([_flat(parameters[name].detach()) for name in names])
    return Reference(torch.einsum("mcp,mdp->mcd", j, solved), j, data, prior_precision, theta)


def _parameters(model):
    """By their names, with the wrappers of torch.compile and DataParallel and without them."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return {name.replace("_orig_mod.", "").removeprefix("module."): p for name, p in named.items()} | named
