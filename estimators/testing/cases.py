"""The kit's problems: small, with a closed form, δ, σ and C other than 1, and batches that do not divide N."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from estimators.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from estimators.testing.networks import Array, Dense

__all__ = ["CASES", "CPU", "GROUPS", "Case"]

CPU = torch.device("cpu")
_N, _M, _D, _HIDDEN = 20, 7, 3, 4
GROUPS = {"*bias": 0.9, "*": 3.1}
"""A prior precision for biases and one for weights."""


@dataclass(frozen=True)
class Case:
    """A problem of the kit: a network with its likelihood, rows, queries and prior.

    Args:
        name: the name in reports.
        kind: the kind of the likelihood: "regression", "classification" or "binary".
        network: the network with its weights.
        x: training inputs (N, D).
        y: targets (N, C), or classes (N,).
        query: query inputs (M, D).
        delta: δ, or a mapping from globs to δ.
        sigma: the noise in regression, one number or one per output.
        batch_size: the batch size of the loader.
        dtype: the dtype of the module and of every tensor.
        device: the device of the module and of every tensor.

    Example:
        >>> CASES["classification"].module()(CASES["classification"].queries).shape
        torch.Size([7, 3])
    """

    name: str
    kind: str
    network: Dense
    x: Array
    y: Array
    query: Array
    delta: float | Mapping[str, float]
    sigma: float | tuple[float, ...] = 0.6
    batch_size: int = 6
    dtype: torch.dtype = torch.float64
    device: torch.device = CPU

    @property
    def likelihood(self) -> Likelihood:
        """A new likelihood object."""
        if self.kind == "regression":
            return Gaussian(self.sigma if isinstance(self.sigma, float) else torch.tensor(self.sigma, dtype=self.dtype))
        return Categorical() if self.kind == "classification" else Bernoulli()

    def module(self) -> nn.Module:
        """Return a new module in eval mode."""
        return self.network.module(self.dtype).to(self.device)

    @property
    def inputs(self) -> Tensor:
        """The training inputs as a tensor (N, D)."""
        return torch.from_numpy(self.x).to(self.device, self.dtype)

    @property
    def targets(self) -> Tensor:
        """The targets as a tensor (N, C) or (N,)."""
        y = torch.from_numpy(self.y)
        return y.to(self.device, torch.long if self.kind == "classification" else self.dtype)

    @property
    def queries(self) -> Tensor:
        """The queries as a tensor (M, D)."""
        return torch.from_numpy(self.query).to(self.device, self.dtype)

    @property
    def loader(self) -> list[tuple[Tensor, Tensor]]:
        """The training batches; the last one is smaller."""
        return list(zip(self.inputs.split(self.batch_size), self.targets.split(self.batch_size), strict=True))

    def rows(self, index: Array | list[int]) -> Case:
        """Return the case with other training rows.

        Args:
            index: indices of rows; an index may be repeated.

        Returns:
            A new case.
        """
        return replace(self, x=self.x[np.asarray(index, dtype=int)], y=self.y[np.asarray(index, dtype=int)])


def _case(name: str, kind: str, *, hidden: int | None = None, seed: int = 0) -> Case:
    rng = np.random.default_rng(seed + 100)
    outputs = 3 if kind == "classification" else 2
    network = Dense.drawn(_D, outputs, hidden=hidden, seed=seed)
    delta = 2.3 if hidden is None else 5.3  # the exact Hessian is positive definite, also with every row twice
    x, query = rng.normal(size=(_N, _D)), 1.3 * rng.normal(size=(_M, _D))
    f = network.outputs(x)
    if kind == "regression":
        y = f + 0.2 * rng.normal(size=f.shape)
    elif kind == "classification":
        y = (f + rng.gumbel(size=f.shape)).argmax(-1).astype(float)
    else:
        y = (f + rng.logistic(size=f.shape) > 0).astype(float)
    return Case(name, kind, network, x, y, query, delta)


CASES: dict[str, Case] = {
    "linear regression": _case("linear regression", "regression"),
    "softmax regression": _case("softmax regression", "classification", seed=1),
    "logistic regression": _case("logistic regression", "binary", seed=2),
    "regression": _case("regression", "regression", hidden=_HIDDEN, seed=27),
    "classification": _case("classification", "classification", hidden=_HIDDEN, seed=22),
    "binary": _case("binary", "binary", hidden=_HIDDEN, seed=55),
}
"""Three linear models, and the same three with a hidden layer."""
