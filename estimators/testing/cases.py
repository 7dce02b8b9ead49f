"""The kit's problems: small, in closed form, away from δ = 1, σ = 1 and C = 1, in batches that do not divide N."""

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
    """A network with its likelihood, rows, queries and prior.

    kind: of the likelihood. sigma: of the noise, one or one an output (regression). network: with its weights.
    x (N, D), y (N, C) or (N,), query (M, D), in numpy. delta: δ, or a mapping by glob. batch_size: of the loader.
    dtype and device: of the module and of every tensor.
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
        """A new module, in eval mode."""
        return self.network.module(self.dtype).to(self.device)

    @property
    def inputs(self) -> Tensor:
        """x as a tensor."""
        return torch.from_numpy(self.x).to(self.device, self.dtype)

    @property
    def targets(self) -> Tensor:
        """y as a tensor."""
        y = torch.from_numpy(self.y)
        return y.to(self.device, torch.long if self.kind == "classification" else self.dtype)

    @property
    def queries(self) -> Tensor:
        """The queries as a tensor."""
        return torch.from_numpy(self.query).to(self.device, self.dtype)

    @property
    def loader(self) -> list[tuple[Tensor, Tensor]]:
        """Batches, the last one ragged."""
        return list(zip(self.inputs.split(self.batch_size), self.targets.split(self.batch_size), strict=True))

    def rows(self, index: Array | list[int]) -> Case:
        """With these training rows."""
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
