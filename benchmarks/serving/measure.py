"""Latency of a fit that was exported, beside its network alone and beside `predict`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from bdl_bench.networks.small import mlp
from benchmarks.clock import interleaved, timed
from benchmarks.fresh import in_fresh_process
from benchmarks.large.models import TrainedCase, pretrained_minilm
from benchmarks.records import Measured
from estimators import LastLayerLaplace, LinearizedLaplace, LinearResponse, PosteriorDraws, RegVar, UncertaintyEstimator
from estimators.numerics.pytrees import PyTree, forward_arguments, select_rows

__all__ = ["METHODS", "NETWORKS", "SIZES", "measure_serving"]

SIZES = (1, 4, 32)
"""Numbers of rows of a query: the first and the last, or the first two if a row takes seconds."""
N_DRAWS = 16
_DELTA = 1.0
_CALLS = {"mlp": 5, "cnn": 5}
"""Calls per repeat, whose mean is one time; one for the others."""


def _rows(shape: tuple[int, ...], outputs: int, build: Callable[[], nn.Module]) -> TrainedCase:
    """Return an untrained network with random rows: latency does not depend on their values."""
    torch.manual_seed(0)
    x, y = torch.randn(128, *shape), torch.randint(0, outputs, (128,))
    return TrainedCase(build().eval(), list(zip(x.split(32), y.split(32), strict=True)), torch.randn(3, *shape))


def _convolutional() -> nn.Sequential:
    first = nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    second = nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


NETWORKS: dict[str, Callable[[], TrainedCase]] = {
    "mlp": partial(_rows, (64,), 10, partial(mlp, 64, 128, 10)),
    "cnn": partial(_rows, (1, 8, 8), 10, _convolutional),
    "minilm": partial(pretrained_minilm, 32),
}
METHODS: dict[str, Callable[[nn.Module], UncertaintyEstimator]] = {
    "last-layer": lambda model: LastLayerLaplace(model, "classification", prior_precision=_DELTA),
    "kron": lambda model: LinearizedLaplace(model, "classification", prior_precision=_DELTA, hessian_structure="kron"),
    "draws": lambda model: RegVar(
        model,
        "classification",
        prior_precision=_DELTA,
        regularizer=PosteriorDraws(N_DRAWS, variance_estimate="monte_carlo"),
        solver=LinearResponse(),
    ),
}


def measure_serving(network: str, method: str) -> Measured:
    """Return the latency of the network alone, of `predict` and of the exported module, and their difference."""
    measured, _ = in_fresh_process(_measured, network, method)
    return measured


def _measured(network: str, method: str) -> Measured:
    case = NETWORKS[network]()
    estimator = METHODS[method](case.model).fit(case.loader)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fit.pt2"
        export_seconds = timed(lambda: estimator.export(path, case.queries))
        size, module = path.stat().st_size, torch.export.load(path).module()
    found: Measured = {"export_seconds": export_seconds, "bytes": size}
    takes_seconds = network == "minilm" and method != "last-layer"
    for n in SIZES[:2] if takes_seconds else SIZES[::2]:
        x = select_rows(case.loader[0][0], slice(0, n))
        difference = _difference(module, estimator, x)
        calls: list[Callable[[], object]] = [
            partial(_call, case.model, x),
            partial(_call, module, x),
            partial(estimator.predict, x),
        ]
        timings = interleaved([partial(_seconds, call, _CALLS.get(network, 1)) for call in calls])
        names = ("network", "exported", "predict")
        found[str(n)] = {name: timing[0].median for name, timing in zip(names, timings, strict=True)} | {
            "difference": difference
        }
    return found


def _call(module: nn.Module, x: PyTree) -> object:
    arguments, keywords = forward_arguments(x)
    with torch.inference_mode():
        return module(*arguments, **keywords)


def _seconds(call: Callable[[], object], n_calls: int) -> list[float]:
    """Return the seconds of one call, the mean of several, in a list with this one step."""

    def several() -> None:
        for _ in range(n_calls):
            call()

    return [timed(several) / n_calls]


def _difference(module: nn.Module, estimator: UncertaintyEstimator, x: PyTree) -> float:
    """Return max |exported − predict| / max |predict| of the variance."""
    found = _call(module, x)
    assert isinstance(found, dict)
    expected: Tensor = estimator.predict(x).epistemic_variance
    return float((found["epistemic_variance"] - expected).abs().max() / expected.abs().max())
