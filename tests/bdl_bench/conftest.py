"""A task small enough to run in every test, and synthetic records to render without running anything."""

from contextlib import suppress

import numpy as np
import pytest
import torch
from synthetic_records import LONG, QUOTES, SCRIPT, write_grid
from torch import nn

from bdl_bench.methods import METHODS, Method
from bdl_bench.metrics import evaluate
from bdl_bench.problem import Problem
from bdl_bench.records import Cost, Record, RecordStore, Training
from bdl_bench.report import write_report
from bdl_bench.tasks import TASKS
from bdl_bench.tasks.registry import Task
from estimators import LastLayerLaplace
from estimators.errors import TooLargeError
from estimators.training import Recipe

with suppress(pytest.skip.Exception):  # an older torch, with which the tests that need the device are skipped
    import simulated_device  # noqa: F401  it must be there before the first backward pass, which a module may make

SHOWN = ("map", "laplace", "regvar-finetune", "ensemble", "dropout", SCRIPT, QUOTES, LONG)


def make_toy(seed):
    """A linear regression with two outputs; the seed is the data."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(24, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(24, 2, generator=generator, dtype=torch.float64)
    batches = list(zip(x.split(7), y.split(7), strict=True))
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return Problem(network, "regression", batches, batches, batches[:2], prior_precision=0.5, recipe=Recipe(epochs=2))


class Raising(LastLayerLaplace):
    """Raises what it was given when it is fitted."""

    error: Exception

    def _fit(self, objective, *, progress_bar):  # noqa: ARG002
        raise self.error


def method_that_raises(name, error):
    def build(problem, seed):  # noqa: ARG001
        estimator = Raising(problem.model, problem.likelihood, prior_precision=problem.prior_precision)
        estimator.error = error
        return estimator

    return Method(name, f"raises {type(error).__name__}", build)


@pytest.fixture
def toy(monkeypatch):
    """The name of a registered task."""
    monkeypatch.setitem(TASKS, "toy", Task("toy", "a toy", make_toy))
    return "toy"


@pytest.fixture
def broken(monkeypatch):
    """The name of a registered method that fails."""
    monkeypatch.setitem(METHODS, "broken", method_that_raises("broken", ZeroDivisionError("on purpose")))
    return "broken"


@pytest.fixture
def oversized(monkeypatch):
    """The name of a registered method that would need more memory than there is."""
    error = TooLargeError("a matrix", bytes_needed=2**50, bytes_available=2**30, remedy="last-layer.")
    monkeypatch.setitem(METHODS, "oversized", method_that_raises("oversized", error))
    return "oversized"


def synthetic_arrays(kind, seed, *, scale):
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=(60, 3))
    epistemic = scale * rng.gamma(2.0, size=(60, 3))
    if kind == "regression":
        targets = mean + rng.normal(size=mean.shape)
        return {"mean": mean, "epistemic_variance": epistemic, "total_variance": epistemic + 1, "targets": targets}
    logits = mean / np.sqrt(1 + np.pi / 8 * epistemic)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    targets = rng.integers(3, size=60).astype(float)
    return {"mean": mean, "epistemic_variance": epistemic, "probs": probs, "targets": targets}


def writer_into(directory):
    """write(task, method, seed, ...) -> a record with synthetic arrays in a directory."""
    store = RecordStore(directory)

    def write(task, method, seed, *, kind="regression", scale=0.3, status="ok", **fields):
        base = {
            "key": "k", "task": task, "task_summary": "made up", "method": method, "method_summary": "made up",
            "seed": seed, "status": status, "environment": {"python": "3"}, **fields,
        }  # fmt: skip
        if status != "ok":
            return store.write(Record(**base))
        arrays = synthetic_arrays(kind, seed, scale=scale)
        cost = Cost(
            fit_seconds=1.5, predict_seconds=0.01, peak_bytes=2**28, peak_increase_bytes=2**20, peak_reset=False
        )
        record = Record(
            **base,
            kind=kind,
            metrics=evaluate(kind, arrays),
            cost=cost,
            training=Training(seconds=None, recipe=None),
            configuration={"prior_precision": "1.0"},
        )
        return store.write(record, arrays)

    return write


@pytest.fixture
def write_record(tmp_path):
    """write_record(task, method, seed, ...) -> a record with synthetic arrays in tmp_path."""
    return writer_into(tmp_path)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a report on two tasks with four methods of three seeds each; tests only read it."""
    directory = tmp_path_factory.mktemp("page")
    write = writer_into(directory)
    for seed in range(3):
        for task, kind in (("reg", "regression"), ("cls", "classification")):
            for method, scale in (
                ("map", 0.0),
                ("laplace", 0.3),
                ("last-layer-laplace", 0.2),
                ("regvar-finetune", 5.0),
            ):
                write(task, method, seed, kind=kind, scale=scale)
    return write_report(directory)


@pytest.fixture(scope="session")
def rendered(tmp_path_factory):
    """The directory of a report with every section, rendered once; tests only read it."""
    directory = tmp_path_factory.mktemp("rendered")
    write_grid(directory, methods=SHOWN, seeds=2, rows=60)
    write_report(directory)
    return directory
