"""Three regressions whose tables are in this package: concrete, airfoil and bike sharing.

Source: the UCI Machine Learning Repository (CC BY 4.0; attribution in bdl_bench/data/tables/README.md).
- concrete (Yeh 1998): 8 inputs, compressive strength in MPa; 1,030 rows, 1,005 of them distinct.
- airfoil (Brooks et al. 1989): 5 inputs, sound pressure in dB; 1,503 rows.
- bike (Fanaee-T and Gama 2013): 12 inputs (season, year, month, hour, holiday, weekday, working day, weather, two
  temperatures, humidity, wind speed), rentals per hour; 17,379 rows, 17,377 of them distinct.
Inputs and target are standardised with mean and standard deviation of the training rows; predictions and scores are in
the unit of the target.

`concrete`, `airfoil`, `bike`: distinct rows; 80 % train, 10 % validation, 10 % test, drawn by the seed. `airfoil-gap`
(Foong et al. 2019): distinct rows sorted by the input of number seed mod 5, the middle third out of distribution with
its targets, the others 80/10/10. Models: one hidden layer of 50 ReLU units (501, 351 and 701 parameters; bike has two,
3,251), float64. σ is about the error that such networks reach, in standard deviations of the target. Prior precision
δ = 1. Both are fixed, not tuned. Recipe: Adam, 100 epochs (bike 30), batches of 64 (bike 256), learning rate 0.01,
cosine.

`airfoil-bde` and `bike-bde`: the protocol of the package bde (Arvanitis et al. 2025, paper/scripts/benchmark.py): all
rows, the split of scikit-learn's train_test_split(test_size=0.2, random_state=0) at every seed, and scores in standard
deviations of the target. 15 % of the training rows validate, drawn by the seed. With this split a linear model has
their RMSE, .6598 and .7796. Model: four hidden layers of 16 ReLU units. Recipe: Adam, learning rate 0.001, batches of
64 (bike 256), 400 epochs (bike 100), cosine. Theirs is AdamW with early stopping after at most 1,200 epochs of all
rows, and their likelihood has a variance for each row; here σ is one number.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from sklearn.model_selection import train_test_split

from bdl_bench.data.uci import Indices, shipped_table
from bdl_bench.networks.small import relu_mlp
from bdl_bench.problem.problem import Problem
from bdl_bench.tasks.registry import register
from bdl_bench.tasks.split import gap_split, split_indices, split_validation
from bdl_bench.tasks.uci import regression
from estimators.training.training import Recipe

__all__ = ["TABLES", "Table"]

_TRAIN, _VALIDATION = 0.8, 0.1
_BDE_TEST, _BDE_VALIDATION = 0.2, 0.15
_BDE_HIDDEN = (16, 16, 16, 16)


@dataclass(frozen=True)
class Table:
    """A table of this package.

    Args:
        name: of the file and the task.
        n_inputs: D.
        hidden: widths of the hidden layers.
        sigma_noise: σ in standard deviations of the target.
        epochs: of training.
        batch_size: of training.
        bde_epochs: of training by the protocol of bde.
        measured: the target, in words, with its unit.
    """

    name: str
    n_inputs: int
    hidden: tuple[int, ...]
    sigma_noise: float
    epochs: int
    batch_size: int
    bde_epochs: int
    measured: str

    def problem(self, seed: int) -> Problem:
        """Return the problem with a random split."""
        columns = shipped_table(self.name)
        n = len(columns.target)
        parts = split_indices(n, train=round(_TRAIN * n), validation=round(_VALIDATION * n), seed=seed)
        return self._problem(parts, self.hidden, self._recipe(self.epochs, 1e-2))

    def gap_problem(self, seed: int) -> Problem:
        """Return the problem without the middle third of the input of number `seed`, modulo D."""
        feature = shipped_table(self.name).inputs[:, seed % self.n_inputs]
        split = gap_split(feature, train=_TRAIN, validation=_VALIDATION, seed=seed)
        return self._problem(split.parts, self.hidden, self._recipe(self.epochs, 1e-2), gap=split.gap)

    def bde_problem(self, seed: int) -> Problem:
        """Return the problem with the split of the package bde."""
        n = len(shipped_table(self.name, distinct=False).target)
        seen, test = train_test_split(np.arange(n), test_size=_BDE_TEST, random_state=0)
        train, validation = split_validation(len(seen), _BDE_VALIDATION, seed)
        recipe = self._recipe(self.bde_epochs, 1e-3)
        return self._problem((seen[train], seen[validation], test), _BDE_HIDDEN, recipe, published=True)

    def _problem(
        self,
        parts: tuple[Indices, ...],
        hidden: tuple[int, ...],
        recipe: Recipe,
        *,
        gap: Indices | None = None,
        published: bool = False,
    ) -> Problem:
        return regression(
            shipped_table(self.name, distinct=not published),
            parts,
            gap=gap,
            sigma_noise=self.sigma_noise,
            network=partial(relu_mlp, self.n_inputs, *hidden, 1),
            recipe=recipe,
            original_unit=not published,
        )

    def _recipe(self, epochs: int, lr: float) -> Recipe:
        return Recipe(epochs=epochs, batch_size=self.batch_size, optimizer="adam", lr=lr, schedule="cosine")


TABLES = (
    Table("concrete", 8, (50,), 0.3, 100, 64, 400, "compressive strength of concrete (MPa)"),
    Table("airfoil", 5, (50,), 0.25, 100, 64, 400, "sound pressure of airfoils (dB)"),
    Table("bike", 12, (50, 50), 0.25, 30, 256, 100, "bicycle rentals per hour"),
)

for _table in TABLES:
    _words = f"Regression: {_table.measured}"
    _widths = "-".join(map(str, (_table.n_inputs, *_table.hidden, 1)))
    register(_table.name, summary=f"{_words}, MLP {_widths}")(_table.problem)
    if _table.name == "airfoil":
        register("airfoil-gap", summary=f"{_words} without the middle third of one input, MLP {_widths}")(
            _table.gap_problem
        )
    if _table.name != "concrete":
        register(
            f"{_table.name}-bde", summary=f"{_words}, the split and the network of the package bde, four layers of 16"
        )(_table.bde_problem)
