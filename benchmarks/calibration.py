"""Calibrated fits on the offline tasks, beside the network alone: `python -m benchmarks.calibration --out FILE`."""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdl_bench.metrics.calibration import adaptive_ece
from bdl_bench.problem.problem import Problem
from bdl_bench.tasks import TASKS
from estimators import LastLayerLaplace, LinearizedLaplace, LinearResponse, Prediction, RegVar, UncertaintyEstimator
from estimators.baselines import MAP, TemperatureScaling
from estimators.calibration.scores import negative_log_predictive
from estimators.errors import NotConvergedWarning
from estimators.runtime.rng import seeded
from estimators.training.training import train_map

__all__ = ["main", "measure", "table"]

OFFLINE = ("toy-gap", "diabetes", "diabetes-gap", "wine", "breast-cancer", "digits", "digits-cnn", "digits-ood")
LEVEL = 0.9
"""The level of the intervals whose coverage is compared with it."""
NETWORK, CALIBRATED_NETWORK, SCALED = "network", "network, calibrated", "temperature scaling"
METHODS: dict[str, tuple[type[UncertaintyEstimator], dict[str, Any]]] = {
    "LinearizedLaplace": (LinearizedLaplace, {}),
    "LastLayerLaplace": (LastLayerLaplace, {}),
    "RegVar": (RegVar, {"solver": LinearResponse()}),
}
Row = dict[str, Any]


def measure(task: str, seed: int) -> Row:
    """Return the test NLL per row and the calibration error of each method, trained and fitted with one seed.

    Args:
        task: the name of a task.
        seed: the seed of its problem and of the training.
    """
    problem = _trained(task, seed)
    results = {NETWORK: _scores(_fitted(MAP, problem, calibrated=False), problem)}
    results[CALIBRATED_NETWORK] = _scores(_fitted(MAP, problem), problem)
    if problem.likelihood.kind != "regression":
        scaled = TemperatureScaling(
            problem.model,
            problem.likelihood,
            prior_precision=problem.prior_precision,
            validation=problem.validation,
        )
        results[SCALED] = _scores(scaled.fit(problem.train), problem)
    for name, (method, options) in METHODS.items():
        results[f"{name}, plain"] = _scores(_fitted(method, problem, calibrated=False, **options), problem)
        results[name] = _scores(_fitted(method, problem, **options), problem)
    validation_rows = sum(len(y) for _, y in problem.validation)
    return {"task": task, "seed": seed, "validation_rows": validation_rows, "results": results}


def _trained(task: str, seed: int) -> Problem:
    problem = TASKS[task].problem(seed)
    assert problem.recipe is not None
    with seeded(seed):
        train_map(
            problem.model,
            problem.likelihood,
            problem.train,
            prior_precision=problem.prior_precision,
            recipe=problem.recipe,
            seed=seed,
        )
    return problem


def _fitted(
    method: type[UncertaintyEstimator],
    problem: Problem,
    *,
    calibrated: bool = True,
    **options: Any,  # noqa: ANN401
) -> UncertaintyEstimator:
    estimator = method(problem.model, problem.likelihood, prior_precision=problem.prior_precision, **options)
    return estimator.fit(problem.train, val_loader=problem.validation if calibrated else None)


def _scores(estimator: UncertaintyEstimator, problem: Problem) -> Row:
    x, y = (torch.cat(parts) for parts in zip(*problem.test, strict=True))
    prediction = estimator.predict(x) if estimator.calibration_ else estimator.predict_uncalibrated(x)
    record = estimator.calibration_
    return {
        "nll": negative_log_predictive(prediction, y, problem.likelihood).tolist(),
        "error": _calibration_error(prediction, y),
        "chosen": None if record is None else record.chosen_values,
    }


def _calibration_error(prediction: Prediction, y: Tensor) -> float:
    """Return the adaptive ECE of the top class, or in regression |coverage − level| of the central interval."""
    if prediction.kind == "regression":
        low, high = prediction.interval(LEVEL)
        return abs(float(((y >= low) & (y <= high)).double().mean()) - LEVEL)
    assert prediction.probs is not None
    probs = prediction.probs.double()
    if prediction.kind == "binary":
        confidence, correct = torch.maximum(probs, 1 - probs).flatten(), ((probs > 0.5) == (y > 0.5)).flatten()
    else:
        confidence, label = probs.max(-1)
        correct = label == y
    return adaptive_ece(confidence.numpy(), correct.double().numpy())


def table(rows: Sequence[Row]) -> str:
    """Return the Markdown table of tasks and methods: means over seeds, with standard errors of differences.

    Args:
        rows: results of `measure`.
    """
    lines = [
        "| task (validation rows) | method | NLL, plain | NLL, calibrated | minus that of the network | minus that of "
        "the calibrated network | ECE or coverage error, plain | calibrated |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        label = f"{task} ({of_task[0]['validation_rows']})"
        for name in (CALIBRATED_NETWORK, SCALED, *METHODS):
            if name not in of_task[0]["results"]:
                continue
            plain = f"{name}, plain" if name in METHODS else NETWORK
            entries = [label, name, _mean(of_task, plain, "nll", 3), _mean(of_task, name, "nll", 3)]
            entries += [_difference(of_task, name, NETWORK), _difference(of_task, name, CALIBRATED_NETWORK)]
            entries += [_mean(of_task, plain, "error", 3), _mean(of_task, name, "error", 3)]
            lines.append(f"| {' | '.join(entries)} |")
            label = ""
    return "\n".join(lines)


def _mean(rows: Sequence[Row], name: str, what: str, digits: int) -> str:
    return f"{np.mean([np.mean(row['results'][name][what]) for row in rows]):.{digits}f}"


def _difference(rows: Sequence[Row], name: str, other: str) -> str:
    """Return the mean difference of the NLL, and its standard error from the test rows of all seeds."""
    parts = [np.subtract(row["results"][name]["nll"], row["results"][other]["nll"]) for row in rows]
    mean = float(np.mean([part.mean() for part in parts]))
    error = math.sqrt(sum(part.var(ddof=1) / len(part) for part in parts)) / len(parts)
    return "0" if name == other else f"{mean:+.4f} ± {error:.4f}".replace("-", "−")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure tasks and seeds, write the results to a file and print the table.

    Args:
        arguments: the words of the command line; None: those of this process.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(OFFLINE), help="names of tasks")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="seeds of each task")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write; what it has is kept")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", NotConvergedWarning)
    rows: list[Row] = json.loads(options.out.read_text()) if options.out.exists() else []
    for seed in options.seeds:
        for task in options.tasks:
            if not any((row["task"], row["seed"]) == (task, seed) for row in rows):
                rows.append(measure(task, seed))
                options.out.write_text(json.dumps(rows))
                print(task, seed, flush=True)
    print(table(sorted(rows, key=lambda row: (OFFLINE.index(row["task"]), row["seed"]))))


if __name__ == "__main__":
    main()
