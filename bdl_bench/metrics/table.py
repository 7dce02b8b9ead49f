"""The metrics of test rows for each kind of likelihood."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from bdl_bench.metrics import calibration, classification, conformal, regression, selective, sparsification, temperature
from bdl_bench.metrics.groups import parts
from bdl_bench.metrics.metric import RELEVANT_NATS, RELEVANT_RATE, Arrays, Metric
from bdl_bench.metrics.per_example import class_arrays, confidences, top_labels

__all__ = ["LEVELS", "METRICS", "conformal_metrics", "sample_metrics", "variance_metrics"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

LEVELS = (0.5, 0.8, 0.9, 0.95)
"""Nominal levels of the central intervals whose coverage is reported."""


_NATS = ("NLL", "NLL*", "jNLL")
_RATES = ("cls/", "cal/", "sc/AURC", "sc/E-AURC", "sc/AUGRC", "cp/coverage", "cov/")


def _with_relevant(metric: Metric) -> Metric:
    """Return a metric with its smallest relevant difference, if it is a log score or a rate."""
    if metric.key.rpartition("/")[2] in _NATS:
        return replace(metric, relevant=RELEVANT_NATS)
    return replace(metric, relevant=RELEVANT_RATE) if metric.key.startswith(_RATES) else metric


def variance_metrics(kind: str, arrays: Arrays) -> tuple[Metric, ...]:
    """Return selective prediction by epistemic variance; nothing if that is constant and so orders no rows."""
    if kind == "regression" or "epistemic_variance" not in arrays or np.ptp(confidences(kind, arrays)) == 0:
        return ()
    found = (
        Metric("sc/AURC/variance", "AURC (variance)", "area under the risk-coverage curve, least variance first",
               "lower", compute=partial(_risk_by_variance, selective.aurc, kind)),
        Metric("sc/AUGRC/variance", "AUGRC (variance)", "mean risk of an undetected failure, least variance first",
               "lower", compute=partial(_risk_by_variance, selective.augrc, kind)),
    )  # fmt: skip
    return tuple(map(_with_relevant, found))


def sample_metrics(kind: str, arrays: Arrays) -> tuple[Metric, ...]:
    """Return the metrics that need function samples or covariances; those that a record has the numbers of."""
    found: list[Metric] = []
    prefix = "reg" if kind == "regression" else "cls"
    if "joint_nll" in arrays:
        found.append(_JOINT_NLL[prefix])
    if "energy_score" in arrays:
        found.append(_ENERGY_SCORE)
    if kind != "regression" and "mutual_information" in arrays and np.ptp(arrays["mutual_information"]) > 0:
        found += _BY_INFORMATION
    return tuple(map(_with_relevant, found))


def conformal_metrics(kind: str, arrays: Arrays) -> tuple[Metric, ...]:
    """Return coverage and size of split conformal sets; nothing with too few validation rows for a threshold."""
    validation = parts(arrays).validation
    if "targets" not in validation or not conformal.enough_rows(len(validation["targets"])):
        return ()
    return tuple(map(_with_relevant, _CONFORMAL_INTERVALS if kind == "regression" else _CONFORMAL_SETS))


def _conformal_intervals(arrays: Arrays) -> tuple[Floats, Floats]:
    """Return whether each target is inside its conformal interval, and the width of that, both (M, C)."""
    return conformal.intervals(*_target_and_moments(arrays), _target_and_moments(parts(arrays).validation))


def _target_and_moments(arrays: Arrays) -> tuple[Floats, Floats, Floats]:
    return arrays["targets"], arrays["mean"], np.sqrt(arrays["total_variance"])


def _conformal_coverage(arrays: Arrays) -> Floats:
    return _of_rows(_conformal_intervals(arrays)[0], arrays)


def _conformal_width(arrays: Arrays) -> Floats:
    return _of_rows(_conformal_intervals(arrays)[1], arrays)


def _conformal_sets(arrays: Arrays) -> tuple[NDArray[np.bool_], Integers]:
    """Return the conformal set of each example, (M, C), and its target."""
    log_probs, targets = class_arrays(arrays)
    validation_log_probs, validation_targets = class_arrays(parts(arrays).validation)
    return conformal.class_sets(log_probs, validation_log_probs, validation_targets), targets


def _set_coverage(arrays: Arrays) -> Floats:
    sets, targets = _conformal_sets(arrays)
    return _of_rows(sets[np.arange(len(targets)), targets].astype(np.float64), arrays)


def _set_size(arrays: Arrays) -> Floats:
    return _of_rows(_conformal_sets(arrays)[0].sum(-1).astype(np.float64), arrays)


def _by_information(area: Callable[[Floats, Floats], float], arrays: Arrays) -> float:
    return area(-arrays["mutual_information"].reshape(-1), 1 - top_labels(arrays).correct.reshape(-1))


def _ause(arrays: Arrays) -> float:
    """Return the AUSE of all outputs, each an example of its own."""
    error = np.square(arrays["targets"] - arrays["mean"])
    return sparsification.ause(arrays["total_variance"].reshape(-1), error.reshape(-1))


def _class_scores(function: Callable[[Floats, Integers], Floats], arrays: Arrays) -> Floats:
    return _of_rows(function(*class_arrays(arrays)), arrays)


def _nll_at_optimum(arrays: Arrays) -> Floats:
    """Return the NLL at the temperature of the validation rows; without these, cross-validated on the test rows."""
    validation = parts(arrays).validation
    log_probs, targets = class_arrays(arrays)
    if not validation:
        scores = temperature.cross_validated_nll(log_probs, targets, n_rows=len(arrays["targets"]))
    else:
        chosen = temperature.optimal_temperature(*class_arrays(validation))
        scores = temperature.nll_at(log_probs, targets, chosen)
    return _of_rows(scores, arrays)


def _of_rows(scores: Floats, arrays: Arrays) -> Floats:
    """Return the mean over the outputs of each row, (M,), since rows are the unit of every comparison."""
    means: Floats = scores.reshape(len(arrays["targets"]), -1).mean(-1)
    return means


def _by_confidence(error: Callable[..., float], arrays: Arrays) -> float:
    found = top_labels(arrays)
    return error(found.confidence.reshape(-1), found.correct.reshape(-1))


def _by_order(error: Callable[..., float], arrays: Arrays) -> float:
    found = top_labels(arrays)
    return error(found.confidence.reshape(-1), found.correct.reshape(-1), found.log_odds.reshape(-1))


def _classwise_ece(arrays: Arrays) -> float:
    log_probs, targets = class_arrays(arrays)
    return calibration.classwise_ece(np.exp(log_probs), targets)


def _risk(area: Callable[[Floats, Floats], float], arrays: Arrays) -> float:
    found = top_labels(arrays)
    return area(found.log_odds.reshape(-1), 1 - found.correct.reshape(-1))


def _risk_by_variance(area: Callable[[Floats, Floats], float], kind: str, arrays: Arrays) -> float:
    return area(confidences(kind, arrays).reshape(-1), 1 - top_labels(arrays).correct.reshape(-1))


def _gaussian(function: Callable[..., Floats], arrays: Arrays, **keywords: float) -> Floats:
    return function(arrays["mean"], arrays["total_variance"], arrays["targets"], **keywords)


def _squared_error(arrays: Arrays) -> Floats:
    return regression.squared_error(arrays["mean"], arrays["targets"])


def _coverage_error(arrays: Arrays) -> float:
    return regression.coverage_error(_gaussian(regression.central_level, arrays).reshape(-1))


def _width(arrays: Arrays, *, level: float) -> Floats:
    return regression.width(arrays["total_variance"], level=level)


def _coverage_metric(level: float) -> Metric:
    return Metric(
        f"cov/{level * 100:g}",
        f"cov. {level * 100:g} %",
        f"share of targets inside the central {level * 100:g} % interval",
        None,
        partial(_gaussian, regression.coverage, level=level),
        nominal=level,
    )


def _joint_nll(arrays: Arrays) -> Floats:
    return arrays["joint_nll"]


_JOINT_NLL = {
    prefix: Metric(
        f"{prefix}/jNLL", "joint NLL", "−log p of ten labels at two anchor rows together, nats per label", "lower",
        _joint_nll,
    )
    for prefix in ("cls", "reg")
}  # fmt: skip
_ENERGY_SCORE = Metric("reg/ES", "energy score", "energy score of all outputs of a row together, in target units",
                       "lower", lambda arrays: arrays["energy_score"])  # fmt: skip
_BY_INFORMATION = (
    Metric("sc/AURC/mutual_information", "AURC (mutual information)",
           "area under the risk-coverage curve, least mutual information first", "lower",
           compute=partial(_by_information, selective.aurc)),
    Metric("sc/AUGRC/mutual_information", "AUGRC (mutual information)",
           "mean risk of an undetected failure, least mutual information first", "lower",
           compute=partial(_by_information, selective.augrc)),
)  # fmt: skip
_CONFORMAL_INTERVALS = (
    Metric("cp/coverage", "conformal coverage", "share of targets inside the split conformal 90 % interval", None,
           _conformal_coverage, nominal=conformal.LEVEL),
    Metric("cp/width", "conformal width", "mean width of the split conformal 90 % interval", "lower",
           _conformal_width),
)  # fmt: skip
_CONFORMAL_SETS = (
    Metric("cp/coverage", "conformal coverage", "share of targets inside the split conformal 90 % set", None,
           _set_coverage, nominal=conformal.LEVEL),
    Metric("cp/size", "conformal set size", "mean number of classes in the split conformal 90 % set", "lower",
           _set_size),
)  # fmt: skip

_BINARY = (
    Metric("cls/NLL", "NLL", "mean −log p(y), nats", "lower", partial(_class_scores, classification.nll)),
    Metric("cls/NLL*", "NLL*", "NLL at the temperature of the best validation NLL, between ¼ and 100; at 1 if "
           "every validation row is right, since then no temperature is the best", "lower", _nll_at_optimum),
    Metric("cls/Brier", "Brier", "squared distance to the one-hot target, 0 to 2", "lower",
           partial(_class_scores, classification.brier)),
    Metric("cls/Acc", "Accuracy", "share of correct top labels", "higher",
           partial(_class_scores, classification.correct)),
    Metric("cal/ECE", "ECE", "calibration error, 15 bins of equal width", "lower",
           compute=partial(_by_confidence, calibration.ece)),
    Metric("cal/l2-ECE", "l2-ECE", "root mean squared calibration error, 15 bins of equal width", "lower",
           compute=partial(_by_confidence, calibration.l2_ece)),
    Metric("cal/MCE", "MCE", "largest calibration error of a bin, 15 bins of equal width", "lower",
           compute=partial(_by_confidence, calibration.mce)),
    Metric("cal/aECE", "aECE", "calibration error, 15 bins of equal mass", "lower",
           compute=partial(_by_order, calibration.adaptive_ece)),
    Metric("cal/dECE", "dECE", "debiased l2 calibration error, 15 bins of equal mass", "lower",
           compute=partial(_by_order, calibration.debiased_ece)),
    Metric("sc/AURC", "AURC", "area under the risk-coverage curve of the top probability", "lower",
           compute=partial(_risk, selective.aurc)),
    Metric("sc/E-AURC", "E-AURC", "AURC minus that of the best order of the same predictions", "lower",
           compute=partial(_risk, selective.excess_aurc)),
    Metric("sc/AUGRC", "AUGRC", "mean risk of an undetected failure, by the top probability", "lower",
           compute=partial(_risk, selective.augrc)),
)  # fmt: skip

_CLASSIFICATION = (
    *_BINARY,
    Metric("cal/cwECE", "cwECE", "mean over classes of the calibration error of their probability", "lower",
           compute=_classwise_ece),
)  # fmt: skip

_REGRESSION = (
    Metric("reg/NLL", "NLL", "mean −log p(y), nats, noise included", "lower", partial(_gaussian, regression.nll)),
    Metric("reg/RMSE", "RMSE", "root mean squared error of the mean", "lower", _squared_error, root=True),
    Metric("reg/CRPS", "CRPS", "continuous ranked probability score", "lower", partial(_gaussian, regression.crps)),
    Metric("reg/IS95", "interval score 95 %", "width of the central 95 % interval plus 40 times the distance outside",
           "lower", partial(_gaussian, regression.interval_score, level=0.95)),
    Metric("sc/AUSE", "AUSE", "area under the sparsification error of the RMSE, most uncertain outputs removed first",
           "lower", compute=_ause),
    *map(_coverage_metric, LEVELS),
    Metric("cal/QCE", "QCE", "mean |observed − nominal coverage| over 5 %, ..., 95 %", "lower",
           compute=_coverage_error),
    Metric("width/95", "width 95 %", "mean width of the central 95 % interval", None, partial(_width, level=0.95)),
)  # fmt: skip

METRICS: dict[str, tuple[Metric, ...]] = {
    "regression": tuple(map(_with_relevant, _REGRESSION)),
    "classification": tuple(map(_with_relevant, _CLASSIFICATION)),
    "binary": tuple(map(_with_relevant, _BINARY)),
}
"""The metrics of the test rows of every method, by kind of likelihood."""
