"""Rows at which the error of a variance estimate is measured: training rows, and rows unlike them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from estimators.errors import EstimatorError
from estimators.models.failures import FAILURES
from estimators.models.network import Network
from estimators.numerics.pytrees import PyTree, concatenate, difference, n_rows, select_rows
from estimators.numerics.reductions import norms
from estimators.objective.objective import Objective

__all__ = ["ProbeRows", "output_gradient", "random_training_rows", "unit_gradients"]

_SPREADS = ((3.0, 0.0), (1.0, 1.0), (0.2, 0.0))
"""Kinds of perturbed rows: factor of the distance from the mean row, and noise in units of the standard deviation.

Without rows far from the data, the error there was up to four times the measured one.
"""


@dataclass(frozen=True)
class ProbeRows:
    """One output at each of some training rows and perturbed rows; each output is taken equally often.

    Perturbed rows stand for data unlike the training rows, at which the error is larger. Each entry of such a row is
    taken from another training row, which keeps every column's values and breaks their dependence. On floating-point
    inputs, a third of the perturbed rows is moved away from the mean row, to three times the distance. Another third
    gets Gaussian noise of each column's standard deviation, and the last is moved four fifths of the way to the mean
    row. For a single training row, the standard deviation is the root mean square of its entries.

    Args:
        gradients: ∂f_c/∂θ of each probe, (m, P), divided by its norm: relative errors do not depend on the scale of an
            output, and the round-off of a large output must not cover a small one.
        training: which of them are training rows, (m,), bool. The others are perturbed; there are none if the network
            cannot take such.
    """

    gradients: Tensor
    training: Tensor

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
        network, half = objective.network, n_probes // 2
        outputs = torch.randperm(network.outputs(shuffled[0]).shape[-1], generator=generator).tolist()
        like = _gradients(network, shuffled[:half], outputs)
        try:
            unlike = _gradients(network, _perturbed_rows(shuffled, half, generator), _rotated(outputs, half))
        except (EstimatorError, *FAILURES):
            unlike = like[:0]
        return cls(torch.cat([like, unlike]), torch.arange(len(like) + len(unlike)) < len(like))

    def followed_by(self, others: ProbeRows) -> ProbeRows:
        """Return these probes and then the others."""
        return ProbeRows(torch.cat([self.gradients, others.gradients]), torch.cat([self.training, others.training]))


def _rotated(outputs: list[int], by: int) -> list[int]:
    """Return the outputs from number `by` on, and then those before, so that many outputs are not the same again."""
    start = by % len(outputs)
    return outputs[start:] + outputs[:start]


def _gradients(network: Network, rows: list[PyTree], outputs: list[int]) -> Tensor:
    """Return ∂f_c/∂θ at each row in units of its norm, (m, P), with c from `outputs` in turn.

    Rows with a gradient that is 0 or not finite are left out.
    """
    found = [output_gradient(network, row, outputs[i % len(outputs)], len(outputs)) for i, row in enumerate(rows)]
    gradients = torch.cat(found) if found else network.theta.new_zeros(0, network.theta.numel())
    return unit_gradients(gradients)


def unit_gradients(gradients: Tensor) -> Tensor:
    """Return the gradients (m, P) divided by their norms, without those that are 0 or not finite."""
    sizes = norms(gradients)
    keep = torch.isfinite(sizes) & (sizes > torch.finfo(gradients.dtype).tiny)
    return gradients[keep] / sizes[keep, None].to(gradients.dtype)


def output_gradient(network: Network, row: PyTree, output: int, n_outputs: int) -> Tensor:
    """Return ∂f_c/∂θ at one row, (1, P), for the output c of `n_outputs`."""
    cotangent = network.theta.new_zeros(1, 1, n_outputs)
    cotangent[0, 0, output] = 1.0
    return network.vjp(row, cotangent)


def _perturbed_rows(rows: list[PyTree], n_wanted: int, generator: torch.Generator) -> list[PyTree]:
    """Return rows whose entries come from random ones of `rows`, some with noise or close to their mean."""
    pool = concatenate([row for row in rows if difference([rows[0], row]) is None])
    kinds = len(_SPREADS)  # each kind gets another output in every round, also with as many outputs as kinds
    return [_recombined(pool, generator, *_SPREADS[(i + i // kinds) % kinds]) for i in range(n_wanted)]


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
