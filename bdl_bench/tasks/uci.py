"""Regressions of the UCI Machine Learning Repository, each with a random split and with a gap split.

Source: the repository's own CSV files, CC BY 4.0, downloaded at the first use.
- concrete (Yeh 1998): 1030 rows, 8 inputs, compressive strength.
- energy (Tsanas & Xifara 2012): 768 rows, 8 inputs, heating load.
- yacht (Gerritsma et al. 1981): 308 rows, 6 inputs, residuary resistance.
- airfoil (Brooks et al. 1989): 1503 rows, 5 inputs, sound pressure.
- power (Tüfekci 2014): 9568 rows, 4 inputs, electrical output.
Rows that repeat another in all columns are dropped, so that no row is in two parts: some tables are a little smaller
here than in papers.
Split of `uci-<name>`: 80 % train, 10 % validation, 10 % test, drawn by the seed. Split of `uci-<name>-gap` (Foong et
al. 2019): rows sorted by the input of number seed mod D, the middle third out of distribution with its targets, the
others as before. Inputs and target are standardised with the mean and standard deviation of the training rows.
Model: MLP D-50-1, tanh, float64, 50 D + 101 parameters. Likelihood: Gaussian, σ about the error that such networks
reach (Hernández-Lobato & Adams 2015), in standard deviations of the target. Prior precision δ = 1. Both are fixed, not
tuned.
Recipe: Adam, batches of 64, learning rate 0.01, cosine, about 4000 steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from torch import nn

from bdl_bench.data.uci import uci_table
from bdl_bench.networks.small import mlp
from bdl_bench.problem.problem import Problem
from bdl_bench.tasks.registry import register
from bdl_bench.tasks.split import gap_split, loader, split_indices, standardised
from estimators.likelihoods import Gaussian
from estimators.training.training import Recipe

__all__ = ["TABLES", "UciTable"]

_TRAIN, _VALIDATION = 0.8, 0.1
_ROWS_A_STEP, _STEPS = 64, 4000


@dataclass(frozen=True)
class UciTable:
    """One data set of the repository.

    Args:
        name: of the file.
        number: in the repository.
        n_inputs: D.
        sigma_noise: σ in standard deviations of the target.
        measured: the target, in words.
    """

    name: str
    number: int
    n_inputs: int
    sigma_noise: float
    measured: str

    def problem(self, seed: int, *, has_gap: bool = False) -> Problem:
        """Return the problem with a random split, or with a gap split."""
        x, y = uci_table(self.name, self.number, self.n_inputs)
        if has_gap:
            split = gap_split(x[:, seed % self.n_inputs], train=_TRAIN, validation=_VALIDATION, seed=seed)
            parts, gap = split.parts, split.gap
        else:
            sizes = {"train": round(_TRAIN * len(x)), "validation": round(_VALIDATION * len(x))}
            parts, gap = split_indices(len(x), **sizes, seed=seed), None
        x, y = standardised(x, parts[0]), standardised(y, parts[0])
        epochs = math.ceil(_STEPS / math.ceil(len(parts[0]) / _ROWS_A_STEP))
        return Problem(
            self._network(),
            Gaussian(sigma_noise=self.sigma_noise),
            *(loader(x[i], y[i]) for i in parts),
            prior_precision=1.0,
            recipe=Recipe(epochs=epochs, batch_size=_ROWS_A_STEP, optimizer="adam", lr=1e-2, schedule="cosine"),
            make_model=self._network,
            ood=None if gap is None else {"gap": loader(x[gap], y[gap])},
        )

    def _network(self) -> nn.Module:
        return mlp(self.n_inputs, 50, 1).double().train()


TABLES = (
    UciTable("concrete", 165, 8, 0.3, "compressive strength of concrete"),
    UciTable("energy", 242, 8, 0.1, "heating load of buildings"),
    UciTable("yacht", 243, 6, 0.1, "resistance of yacht hulls"),
    UciTable("airfoil", 291, 5, 0.3, "sound pressure of airfoils"),
    UciTable("power", 294, 4, 0.24, "output of a power plant"),
)

_NEEDS = "a download of less than 1 MB from the UCI repository"


for _table in TABLES:
    _words, _network = f"Regression: {_table.measured}", f"MLP {_table.n_inputs}-50-1"
    register(f"uci-{_table.name}", needs=_NEEDS, summary=f"{_words}, {_network}")(_table.problem)
    register(
        f"uci-{_table.name}-gap", needs=_NEEDS, summary=f"{_words} without the middle third of one input, {_network}"
    )(partial(_table.problem, has_gap=True))
