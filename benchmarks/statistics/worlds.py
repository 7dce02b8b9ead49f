"""Simulated runs of methods that are the same in expectation: difficulties of rows, effects of seeds, and the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from bdl_bench.metrics import Metric
from bdl_bench.metrics.calibration import ece

__all__ = ["DESIGNS", "QUANTITIES", "Design", "Quantity"]

Floats = NDArray[np.float64]
Arrays = Mapping[str, NDArray[Any]]
_OUTSIDE = "ood/other/"


@dataclass(frozen=True)
class Design:
    """What two seeds of an experiment share.

    Args:
        name: in the tables.
        same_rows: whether all seeds have the same test rows.
        copies: whether all seeds are copies of the first one.
        of_rows: standard deviation of a preference of a row for one of the methods, with mean 0 over rows.
    """

    name: str
    same_rows: bool = False
    copies: bool = False
    of_rows: float = 0.0

    def latent(
        self, rng: np.random.Generator, *, n_seeds: int, n_rows: int, n_methods: int = 2
    ) -> tuple[Floats, Floats]:
        """Return scores without the effects of seeds, (methods, seeds, rows), and these effects, (methods, seeds, 1).

        Args:
            rng: the random numbers.
            n_seeds: number of seeds.
            n_rows: number of test rows of each seed.
            n_methods: number of methods.

        Returns:
            Both. The difficulty of a row has standard deviation 0.8, the effect of a seed 0.3, the rest 0.5.
        """
        shared = (1, 1 if self.same_rows else n_seeds, n_rows)
        preference = (n_methods, 1 if self.same_rows else n_seeds, n_rows)
        rows = rng.normal(size=shared) + self.of_rows * rng.normal(size=preference)
        drawn = 1 if self.copies else n_seeds
        seeds, rest = rng.normal(size=(n_methods, drawn, 1)), rng.normal(size=(n_methods, drawn, n_rows))
        scores = np.broadcast_to(0.8 * rows + 0.5 * rest, (n_methods, n_seeds, n_rows))
        return scores, np.broadcast_to(0.3 * seeds, (n_methods, n_seeds, 1))


DESIGNS = (
    Design("new splits"),
    Design("one fixed test set", same_rows=True),
    Design("one fixed test set, rows with preferences", same_rows=True, of_rows=0.5),
    Design("copies of one network", same_rows=True, copies=True),
)


@dataclass(frozen=True)
class Quantity:
    """A metric, and how predictions are made of scores (R,) and the effect of a seed.

    Args:
        metric: a mean over rows, a root of one, or any other function of the arrays.
        arrays: function of the scores of the test rows, the effect of the seed, and random numbers that all seeds of a
            fixed test set share.
    """

    metric: Metric
    arrays: Callable[[Floats, float, np.random.Generator], Arrays]


def _scores(transform: Callable[[Floats], Floats], scores: Floats, seed: float, _: np.random.Generator) -> Arrays:
    return {"mean": transform(scores + seed), "total_variance": scores}  # by which copies are found


def _correct(scores: Floats) -> Floats:
    return (scores < 0.8).astype(np.float64)


def _confidences(scores: Floats, seed: float, rng: np.random.Generator) -> Arrays:
    """Return confidences of an overconfident classifier, and whether it is correct."""
    log_odds = 1.0 + scores
    correct = rng.uniform(size=len(scores)) < 1 / (1 + np.exp(-log_odds))
    return {"mean": 1 / (1 + np.exp(-(1.5 + 0.5 * seed) * log_odds)), "targets": correct.astype(np.float64)}


def _detection(scores: Floats, seed: float, rng: np.random.Generator) -> Arrays:
    return {"mean": scores, f"{_OUTSIDE}mean": 1.0 + seed + rng.normal(size=len(scores))}


def _auroc(arrays: Arrays) -> float:
    """Return the area under the ROC curve by ranks, a tenth of the time of `bdl_bench.metrics.ood.auroc`."""
    outside = arrays[f"{_OUTSIDE}mean"]
    ranks = rankdata(np.concatenate([arrays["mean"], outside]))[-len(outside) :]
    return float((ranks.mean() - (len(outside) + 1) / 2) / len(arrays["mean"]))


def _root_mean_square(name: str, *, root: bool, transform: Callable[[Floats], Floats]) -> Quantity:
    metric = Metric(name, name, name, "lower", scores=lambda arrays: arrays["mean"], root=root)
    return Quantity(metric, partial(_scores, transform))


QUANTITIES: dict[str, Quantity] = {
    "Gaussian scores": _root_mean_square("Gaussian scores", root=False, transform=lambda s: s),
    "heavy-tailed scores (NLL)": _root_mean_square("NLL", root=False, transform=np.exp),
    "accuracy": _root_mean_square("accuracy", root=False, transform=_correct),
    "RMSE": _root_mean_square("RMSE", root=True, transform=np.square),
    "ECE": Quantity(
        Metric("ECE", "ECE", "ECE", "lower", compute=lambda arrays: ece(arrays["mean"], arrays["targets"])),
        _confidences,
    ),
    "AUROC": Quantity(Metric("AUROC", "AUROC", "AUROC", "higher", compute=_auroc), _detection),
}
