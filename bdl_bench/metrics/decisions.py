"""Metrics of decisions: of active learning, Bayesian optimisation and interventions, from the curves of a run.

A curve has one value at the start and one after each round or query, and the value that it is compared with has the
same rounds, so that differences are paired within a seed. The arrays are those of `bdl_bench.decisions`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bdl_bench.metrics.groups import parts
from bdl_bench.metrics.metric import Arrays, Metric

__all__ = ["area", "decision_metrics", "intervention_metrics", "log_ratio"]

Floats = NDArray[np.float64]


def area(curve: Floats) -> float:
    """Return the area under a curve of equal steps by the trapezoidal rule, divided by its width: its mean height.

    Args:
        curve: values at the start and after each round, (R + 1,).

    Returns:
        The area in the unit of the curve.

    Example:
        >>> import numpy as np
        >>> area(np.array([4.0, 2.0, 0.0]))
        2.0
    """
    return float(np.trapezoid(curve) / (len(curve) - 1))


def log_ratio(levels: Floats) -> float:
    """Return log(last/first) of positive values at ascending levels; 0 if nothing changes.

    Args:
        levels: values, (K,).

    Returns:
        The natural logarithm of the ratio.
    """
    return float(np.log(levels[-1]) - np.log(levels[0]))


def decision_metrics(kind: str, arrays: Arrays) -> tuple[Metric, ...]:
    """Return the metrics of active learning or Bayesian optimisation; nothing for records without their curves."""
    curves = parts(arrays).decision
    if "error" in curves:
        return _active_learning("RMSE" if kind == "regression" else "error rate")
    if "regret" in curves:
        return _OPTIMISATION
    return ()


def intervention_metrics(arrays: Arrays) -> tuple[Metric, ...]:
    """Return the effects of interventions on both parts of the uncertainty; nothing for records without them."""
    return _INTERVENTIONS if "size_epistemic" in parts(arrays).decision else ()


def _curve(arrays: Arrays, name: str) -> Floats:
    found: Floats = parts(arrays).decision[name]
    return found


def _area(name: str, arrays: Arrays) -> float:
    return area(_curve(arrays, name))


def _gain(other: str, name: str, arrays: Arrays) -> float:
    return area(_curve(arrays, other)) - area(_curve(arrays, name))


def _last(name: str, arrays: Arrays) -> float:
    return float(_curve(arrays, name)[-1])


def _effect(name: str, arrays: Arrays) -> float:
    return log_ratio(_curve(arrays, name))


def _metric(
    key: str,
    label: str,
    reading: str,
    better: Literal["lower", "higher"] | None,
    compute: Callable[[Arrays], float],
    nominal: float | None = None,
) -> Metric:
    return Metric(key, label, reading, better, compute=compute, nominal=nominal)


def _active_learning(error: str) -> tuple[Metric, ...]:
    return (
        _metric("al/area", f"area ({error})", f"mean {error} of the method over the learning curve, start and end "
                "included", "lower", partial(_area, "error")),
        _metric("al/gain", f"gain over random ({error})", "al/area of the same method with random queries, minus "
                "al/area", "higher", partial(_gain, "random_error", "error")),
        _metric("al/NLL-area", "area (NLL)", "mean NLL of the method over the learning curve, nats", "lower",
                partial(_area, "nll")),
        _metric("al/NLL-gain", "gain over random (NLL)", "al/NLL-area of the same method with random queries, minus "
                "al/NLL-area", "higher", partial(_gain, "random_nll", "nll")),
        _metric("al/network-gain", f"gain of the network ({error})", f"mean {error} of the trained network alone on "
                "random rows, minus that on the rows that the method chose", "higher",
                partial(_gain, "random_network_error", "network_error")),
    )  # fmt: skip


_OPTIMISATION = (
    _metric("bo/area", "mean regret", "mean over queries of the regret: best target of the pool minus the best so far",
            "lower", partial(_area, "regret")),
    _metric("bo/regret", "final regret", "best target of the pool minus the best found after all queries", "lower",
            partial(_last, "regret")),
    _metric("bo/gain", "gain over random", "mean regret of random queries minus bo/area", "higher",
            partial(_gain, "random_regret", "regret")),
    _metric("bo/greedy-gain", "gain over greedy", "mean regret of querying the best mean of the trained network, minus "
            "bo/area", "higher", partial(_gain, "greedy_regret", "regret")),
)  # fmt: skip

_INTERVENTIONS = (
    _metric("dis/epistemic-size", "epistemic, size", "log ratio of the mean epistemic uncertainty, most over fewest "
            "training rows; it must be negative", None, partial(_effect, "size_epistemic")),
    _metric("dis/aleatoric-size", "aleatoric, size", "log ratio of the mean aleatoric uncertainty, most over fewest "
            "training rows; it must be 0", None, partial(_effect, "size_aleatoric"), 0.0),
    _metric("dis/epistemic-noise", "epistemic, noise", "log ratio of the mean epistemic uncertainty, most label noise "
            "over none; it must be 0", None, partial(_effect, "noise_epistemic"), 0.0),
    _metric("dis/aleatoric-noise", "aleatoric, noise", "log ratio of the mean aleatoric uncertainty, most label noise "
            "over none; it must be positive", None, partial(_effect, "noise_aleatoric")),
)  # fmt: skip
