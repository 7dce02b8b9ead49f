"""Rows at which the error of a variance estimate is measured: training rows, and rows unlike them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from estimators.errors import EstimatorError
from estimators.models.derivative_routes import FAILURES
from estimators.models.network import Network
from estimators.numerics.pytrees import PyTree, concatenate, difference, n_rows, select_rows
from estimators.objective.objective import Objective

__all__ = ["ProbeRows", "output_gradient", "random_training_rows"]

_SPREADS = ((1.0, 0.0), (1.0, 1.0), (0.2, 0.0))
"""Kinds of perturbed rows: factor of the distance from the mean row, and noise in units of the standard deviation."""


@dataclass(frozen=True)
class ProbeRows:
    """One random output at each of some training rows and perturbed rows.

    Perturbed rows stand for data unlike the training rows, at which the error is larger. Each entry of such a row is
    taken from another training row, which keeps every column's values and breaks their dependence. On floating-point
    inputs, a third of the perturbed rows also get Gaussian noise of each column's standard deviation, and another third
    is moved four fifths of the way to the mean row. For a single training row, the standard deviation is the root mean
    square of its entries.

    Args:
        gradients: ∂f_c/∂θ of each probe, (m, P); training rows first.
        n_training: number of training rows. The others are perturbed; there are none if the network cannot take such.
    """

    gradients: Tensor
    n_training: int

    @classmethod
    def of(cls, objective: Objective, n_probes: int, seed: int) -> Self:
        """Choose half of the probes among all training rows, and perturb the others.

        Args:
            objective: the objective, with the training rows.
            n_probes: m.
            seed: seed of all choices.
        """
        generator = torch.Generator().manual_seed(seed)
        rows = [
            select_rows(part, slice(i, i + 1))
            for part in random_training_rows(objective, n_probes, generator)
            for i in range(n_rows(part))
        ]
        order = torch.randperm(len(rows), generator=generator).tolist()
        shuffled = [rows[i] for i in order]
        like = _gradients(objective.network, shuffled[: n_probes // 2], generator)
        try:
            unlike = _gradients(objective.network, _perturbed_rows(shuffled, n_probes // 2, generator), generator)
        except (EstimatorError, *FAILURES):
            return cls(like, len(like))
        return cls(torch.cat([like, unlike]), len(like))


def _gradients(network: Network, rows: list[PyTree], generator: torch.Generator) -> Tensor:
    """Return ∂f_c/∂θ at each row for a random output c, (m, P); rows with a gradient that is 0 or not finite go."""
    found = []
    for row in rows:
        n_outputs = network.outputs(row).shape[-1]
        output = int(torch.randint(n_outputs, (), generator=generator))
        found.append(output_gradient(network, row, output, n_outputs))
    gradients = torch.cat(found) if found else network.theta.new_zeros(0, network.theta.numel())
    norms = gradients.norm(dim=1)
    return gradients[torch.isfinite(norms) & (norms > 0)]


def output_gradient(network: Network, row: PyTree, output: int, n_outputs: int) -> Tensor:
    """Return ∂f_c/∂θ at one row, (1, P), for the output c of `n_outputs`."""
    cotangent = network.theta.new_zeros(1, 1, n_outputs)
    cotangent[0, 0, output] = 1.0
    return network.vjp(row, cotangent)


def _perturbed_rows(rows: list[PyTree], n_wanted: int, generator: torch.Generator) -> list[PyTree]:
    """Return rows whose entries come from random ones of `rows`, some with noise or close to their mean."""
    pool = concatenate([row for row in rows if difference([rows[0], row]) is None])
    return [_recombined(pool, generator, *_SPREADS[i % len(_SPREADS)]) for i in range(n_wanted)]


def _recombined(pool: PyTree, generator: torch.Generator, scale: float, noise: float) -> PyTree:
    """Return one row, each entry of which comes from a random row of `pool`.

    Args:
        pool: the rows.
        generator: random generator.
        scale: factor of the distance from the mean row, for floating-point inputs.
        noise: standard deviation of added noise in units of each column's, for floating-point inputs.
    """
    sources: dict[torch.Size, Tensor] = {}  # leaves of the same shape, such as tokens and their mask, share them

    def entries(leaf: Tensor) -> Tensor:
        if not leaf.ndim:
            return leaf
        flat = leaf.reshape(len(leaf), -1)
        width = flat.shape[1]
        if leaf.shape not in sources:
            sources[leaf.shape] = torch.randint(len(leaf), (width,), generator=generator)
        row = flat[sources[leaf.shape].to(leaf.device), torch.arange(width, device=leaf.device)]
        if leaf.is_floating_point():
            z = torch.randn(width, generator=generator, dtype=torch.float64).to(row)
            mean = flat.mean(0)
            # One row has no spread of its own.
            spread = flat.std(0, correction=0) if len(flat) > 1 else flat.square().mean().sqrt()
            row = mean + scale * (row - mean) + noise * spread * z
        return row.reshape(1, *leaf.shape[1:])

    return pytree.tree_map_only(Tensor, entries, pool)


def random_training_rows(objective: Objective, n_wanted: int, generator: torch.Generator) -> list[PyTree]:
    """Return `n_wanted` random training rows, those of each batch together.

    Rows come from all batches, since a loader may be sorted, for instance by class. Batches are not concatenated,
    since their rows may differ in shape.
    """
    order = torch.randperm(objective.batches.n_data, generator=generator)
    chosen, start, taken = order[:n_wanted].sort().values, 0, list[PyTree]()
    for batch in objective.batches:
        inside = chosen[(chosen >= start) & (chosen < start + len(batch))] - start
        if len(inside):
            taken.append(select_rows(batch.x, inside.to(batch.y.device)))
        start += len(batch)
    return taken
