"""The distance of predictions from those of the posterior itself, and the noise floor of that distance.

With mean m and standard deviation s of an output under a method, and m*, s* under the posterior:

    variance    Spearman's correlation of s² and s*², mean of s²/s*², √mean (s²/s*² − 1)²
    mean shift  mean of |m − m*|/s*
    W2          mean of √((m − m*)² + (s − s*)²): the 2-Wasserstein distance of Gaussians with these moments
    classes     share of rows with the same most probable class, and the mean total variation ½ Σ_c |p_c − p*_c|

The posterior is known from Markov chains, with a Monte-Carlo error. Half of the distance between the predictions of its
even and of its odd chains estimates the effect of this error on each distance: the noise floor. A difference of two
distances that is smaller is not known to exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from bdl_bench.metrics.disagreement import top_label_disagreement, total_variation
from bdl_bench.metrics.metric import Arrays

__all__ = ["HALVES", "Fidelity", "fidelity", "half_arrays", "main_distance", "noise_floor", "ranks_above_noise"]

Floats = NDArray[np.float64]

HALVES = ("even", "odd")
"""The halves of the chains; a record of the posterior has arrays such as `even_mean`."""
_HALVED = ("mean", "epistemic_variance", "probs")


@dataclass(frozen=True)
class Fidelity:
    """Distances of one method from the posterior at one set of rows.

    Attributes:
        spearman: rank correlation of the epistemic variances over outputs; None if one is constant.
        mean_ratio: mean of variance / posterior variance.
        relative_rmse: √mean (variance / posterior variance − 1)².
        mean_shift: mean of |mean − posterior mean| / posterior standard deviation.
        w2: mean 2-Wasserstein distance of moment-matched Gaussians, in units of the outputs.
        top_agreement: share of rows with the same most probable class; None in regression.
        total_variation: mean total variation of the class probabilities; None in regression.
    """

    spearman: float | None
    mean_ratio: float
    relative_rmse: float
    mean_shift: float
    w2: float
    top_agreement: float | None = None
    total_variation: float | None = None


def main_distance(kind: str) -> str:
    """Return the field of `Fidelity` by which methods are ranked: total variation, or W2 in regression."""
    return "w2" if kind == "regression" else "total_variation"


def fidelity(kind: str, arrays: Arrays, posterior: Arrays) -> Fidelity:
    """Return the distances of predictions from those of the posterior at the same rows.

    Args:
        kind: "regression", "classification" or "binary".
        arrays: `mean`, `epistemic_variance` (M, C) and, except in regression, `probs` of a method.
        posterior: the same of the posterior, with positive variances.

    Returns:
        The distances, each over all rows and outputs.
    """
    v, exact = arrays["epistemic_variance"].reshape(-1), posterior["epistemic_variance"].reshape(-1)
    shift = np.abs(arrays["mean"] - posterior["mean"]).reshape(-1)
    # A variance estimate from few probes can be negative, which no standard deviation is.
    spread = np.sqrt(np.maximum(v, 0.0)) - np.sqrt(exact)
    ordered = np.ptp(v) > 0 and np.ptp(exact) > 0
    of_classes: dict[str, float] = {}
    if kind != "regression":
        probs, others = (_class_probs(kind, found["probs"]) for found in (arrays, posterior))
        of_classes = {
            "top_agreement": 1 - top_label_disagreement(probs, others),
            "total_variation": float(total_variation(probs, others).mean()),
        }
    return Fidelity(
        spearman=float(spearmanr(v, exact).statistic) if ordered else None,
        mean_ratio=float((v / exact).mean()),
        relative_rmse=float(np.sqrt(np.square(v / exact - 1).mean())),
        mean_shift=float((shift / np.sqrt(exact)).mean()),
        w2=float(np.hypot(shift, spread).mean()),
        **of_classes,
    )


def half_arrays(posterior: Arrays, half: str) -> dict[str, Floats]:
    """Return the predictions by half of the chains under plain names.

    Args:
        posterior: arrays of the posterior at one set of rows.
        half: "even" or "odd".

    Returns:
        Arrays by name; empty if the record has no halves.
    """
    names = {name: f"{half}_{name}" for name in _HALVED}
    return {name: posterior[stored] for name, stored in names.items() if stored in posterior}


def noise_floor(kind: str, posterior: Arrays) -> Fidelity:
    """Return half of the distance between even and odd chains for each field, as a distance from agreement.

    Args:
        kind: "regression", "classification" or "binary".
        posterior: arrays of the posterior at one set of rows, with `even_mean`, `odd_mean` and so on.

    Returns:
        Halved distances: of the correlation and the shares from 1, of the mean ratio from 1.
    """
    even, odd = (half_arrays(posterior, half) for half in HALVES)
    found = fidelity(kind, even, odd)
    # In units of the posterior standard deviation by all chains, as the mean shift of a method.
    scale = np.sqrt(posterior["epistemic_variance"])
    return Fidelity(
        spearman=None if found.spearman is None else (1 - found.spearman) / 2,
        mean_ratio=abs(found.mean_ratio - 1) / 2,
        relative_rmse=found.relative_rmse / 2,
        mean_shift=float((np.abs(even["mean"] - odd["mean"]) / scale).mean()) / 2,
        w2=found.w2 / 2,
        top_agreement=None if found.top_agreement is None else (1 - found.top_agreement) / 2,
        total_variation=None if found.total_variation is None else found.total_variation / 2,
    )


def ranks_above_noise(distances: Mapping[str, float], floor: float) -> dict[str, int]:
    """Return ranks by distance, in which methods within the noise floor of the nearest of a group share its rank.

    Args:
        distances: by method.
        floor: differences up to this are no differences.

    Returns:
        The rank of each method, 1 for the nearest; after a group of n methods n ranks are left out.
    """
    ranks: dict[str, int] = {}
    start, rank = float("-inf"), 0
    for position, method in enumerate(sorted(distances, key=lambda name: distances[name]), start=1):
        if distances[method] - start > floor:
            start, rank = distances[method], position
        ranks[method] = rank
    return ranks


def _class_probs(kind: str, probs: Floats) -> Floats:
    """Return probabilities (..., C) of classes; of Bernoulli outputs, those of both values, (M·C, 2)."""
    if kind != "binary":
        return probs
    flat = probs.reshape(-1)
    return np.stack([1 - flat, flat], axis=-1)
