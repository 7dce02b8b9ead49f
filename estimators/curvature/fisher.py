"""The Fisher information by its exact form, by sampled labels, or by the training labels.

Each is a sum over rows n of Jₙᵀ Gₙ Gₙᵀ Jₙ, with K columns of Gₙ (C, K), the cotangents of K backward passes:

    exact       G = S with SSᵀ = Λ, K = C: the GGN, which equals the Fisher information for canonical links
    mc          columns ∂(−log p(ỹ | f))/∂f / √K of K sampled labels ỹ ~ p(y | f(x; θ̂)): unbiased (Martens 2020,
                section 5)
    empirical   the gradient ∂(−log p(y | f))/∂f of the training label, K = 1: biased (Kunstner et al. 2019)

A sampled label is a function of the seed and of the inputs of its row. It depends neither on the batches nor on the
order of the rows. Rows with equal inputs have samples of their own: the i-th such row in a pass takes the i-th sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from estimators.data.batch import Batch
from estimators.errors import UnsupportedError
from estimators.likelihoods import Likelihood
from estimators.numerics.dtype import to_algebra_dtype
from estimators.numerics.pytrees import PyTree
from estimators.objective.objective import Objective
from estimators.persistence.checksums import row_hashes

__all__ = ["EXACT", "FISHERS", "Fisher", "uniform_numbers"]

FISHERS = ("exact", "mc", "empirical")
"""Values of the option `fisher`."""
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
"""Constants of SplitMix64 (Steele et al. 2014) as signed integers."""
_BITS = 53
"""Bits of a uniform number in float64."""


@dataclass(frozen=True)
class Fisher:
    """Which cotangents G stand for the root of Λ.

    Attributes:
        kind: "exact", "mc" or "empirical".
        mc_samples: sampled labels per row, for "mc".
        seed: determines the sampled labels.
        first_sample: the index of the first sampled label of each row.
        earlier: for "mc", batches whose rows count as read before those of an objective, so that a row with the inputs
            of an earlier one has another sample; None: no batches.
    """

    kind: str = "exact"
    mc_samples: int = 1
    seed: int = 0
    first_sample: int = 0
    earlier: Iterable[Batch] | None = None

    def with_other_samples(self) -> Fisher:
        """Return an estimate from other labels, independent of the first `mc_samples` ones."""
        return replace(self, first_sample=self.first_sample + self.mc_samples)

    def n_cotangents(self, n_outputs: int) -> int:
        """K, the number of backward passes per row."""
        return {"exact": n_outputs, "mc": self.mc_samples, "empirical": 1}[self.kind]

    def batches(self, objective: Objective) -> Iterator[tuple[PyTree, PyTree]]:
        """Yield the inputs of each batch, and what `cotangents` needs besides the outputs: pytrees with rows."""
        seen = Counter[bytes]()
        if self.kind == "mc" and self.earlier is not None:
            for batch in self.earlier:
                seen.update(row_hashes(batch.x))
        for batch in objective.batches:
            yield batch.x, (batch.y, _row_keys(batch.x, seen)) if self.kind == "mc" else (batch.y,)

    @property
    def _samples(self) -> range:
        """The indices of the sampled labels."""
        return range(self.first_sample, self.first_sample + self.mc_samples)

    def cotangents(self, likelihood: Likelihood, f: Tensor, targets: PyTree) -> Tensor:
        """Return the columns of G at each row, (B, K, C), in the dtype of f.

        Args:
            likelihood: the likelihood of the objective.
            f: outputs (B, C).
            targets: of `batches`.

        Raises:
            UnsupportedError: the likelihood has no labels to sample.
        """
        wide = to_algebra_dtype(f)
        if self.kind == "exact":
            return likelihood.given(targets[0]).hessian_sqrt(wide).transpose(1, 2).to(f.dtype)
        if self.kind == "empirical":
            return likelihood.nll_gradient(wide, targets[0])[:, None].to(f.dtype)
        y, keys = targets
        given = likelihood.given(y)
        _check_sampling(given)

        def gradient(sample: int) -> Tensor:
            labels = given.sample_labels(wide, lambda n: uniform_numbers(keys, n, self.seed, sample).to(wide))
            return given.nll_gradient(wide, labels).to(f.dtype)

        gradients = torch.stack([gradient(sample) for sample in self._samples], dim=1)
        return gradients.div_(self.mc_samples**0.5)


EXACT = Fisher()


def _row_keys(x: PyTree, seen: Counter[bytes]) -> Tensor:
    """Return an integer per row (n,), which depends on its inputs and on how many equal rows came before."""
    keys, repeats = [], []
    for row in row_hashes(x):
        keys.append(int.from_bytes(row[:8], "little", signed=True))
        repeats.append(seen[row])
        seen[row] += 1
    return torch.tensor(keys, dtype=torch.int64) ^ _mixed(torch.tensor(repeats, dtype=torch.int64) * _INCREMENT)


def uniform_numbers(keys: Tensor, n: int, seed: int, sample: int) -> Tensor:
    """Return n independent uniform numbers in (0, 1) per key, by a counter-based generator, in float64 on the CPU.

    Args:
        keys: integers (B,).
        n: how many numbers per key.
        seed: of 64 bits.
        sample: the index of the sample.

    Returns:
        The numbers, (B, n).
    """
    stream = torch.tensor([(seed + 2**63) % 2**64 - 2**63, sample], dtype=torch.int64)
    stream = _mixed(_mixed(stream[0] + _INCREMENT) + stream[1] * _INCREMENT)
    states = _mixed(keys.cpu() ^ stream)[:, None] + torch.arange(1, n + 1) * _INCREMENT
    whole = _shifted(_mixed(states), 64 - _BITS)
    numbers: Tensor = (whole.double() + 0.5) * 2.0**-_BITS
    return numbers


def _mixed(z: Tensor) -> Tensor:
    """Return the output function of SplitMix64 at integers of 64 bits, whose products wrap around."""
    z = (z ^ _shifted(z, 30)) * _MULTIPLIERS[0]
    z = (z ^ _shifted(z, 27)) * _MULTIPLIERS[1]
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Return z shifted to the right without its sign."""
    shifted: Tensor = (z >> bits) & (2 ** (64 - bits) - 1)
    return shifted


def _check_sampling(likelihood: Likelihood) -> None:
    """Check that the labels of a likelihood are sampled from the same distribution that its other methods describe.

    Raises:
        UnsupportedError: `sample_labels` is missing, or inherited from a class whose `nll` or Λ is overridden.
    """
    order = type(likelihood).__mro__

    def level(name: str) -> int:
        return next(i for i, kind in enumerate(order) if name in vars(kind))

    changed = [name for name in ("nll", "root_product", "hessian_product") if level(name) < level("sample_labels")]
    if changed:
        raise UnsupportedError(
            'a likelihood with sample_labels for fisher="mc"',
            received=f"{type(likelihood).__name__}, which defines {' and '.join(changed)} without it",
            remedy='implement sample_labels(f, uniform), or use fisher="exact".',
        )
