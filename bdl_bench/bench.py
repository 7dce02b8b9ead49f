"""Cross-method benchmarks: our estimators beside laplace-torch, interleaved in one run, as ratios of medians.

`python -m bdl_bench.bench [DIR]` prints the table and writes it, with the machine described, to DIR/core.md.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bdl_bench.versions import environment
from estimators import LastLayerLaplace, LinearizedLaplace
from estimators.atomic import write_text

__all__ = ["main"]

_REPEATS, _ROWS, _BATCH = 3, 1000, 500
_NOTE = """Both kron forms are Kronecker approximations, but not the same: ours has the bias as the last column of its
weight, laplace-torch gives it a factor of its own. Without biases they agree, as the tests show.
"""


@dataclass(frozen=True)
class Work:
    """One row: `ours` and `theirs` build a fitted object whose `variance` is then timed twice, first and later."""

    title: str
    network: Callable[[], nn.Module]
    shape: tuple[int, ...]
    n_queries: int
    ours: Callable[[nn.Module], Any]
    theirs: dict[str, str]


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs)).eval()


def _cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(4096, 222), nn.ReLU(), nn.Linear(222, 10)),
    ).eval()


def _exact(model: nn.Module) -> LinearizedLaplace:
    return LinearizedLaplace(model, "classification")


def _last_layer(model: nn.Module) -> LastLayerLaplace:
    return LastLayerLaplace(model, "classification", hessian_structure="kron")


def _all_kron(model: nn.Module) -> LinearizedLaplace:
    return LinearizedLaplace(model, "classification", hessian_structure="kron")


WORKS = [
    Work(
        "full GGN, P = 3,010, C = 10",
        lambda: _mlp(64, 40, 10),
        (64,),
        50,
        _exact,
        {"subset_of_weights": "all", "hessian_structure": "full"},
    ),
    Work(
        "last layer kron, D = 128, C = 100",
        lambda: _mlp(64, 128, 100),
        (64,),
        50,
        _last_layer,
        {"subset_of_weights": "last_layer", "hessian_structure": "kron"},
    ),
    Work(
        "all-weights kron, CNN, P = 931,156, C = 10",
        _cnn,
        (3, 32, 32),
        10,
        _all_kron,
        {"subset_of_weights": "all", "hessian_structure": "kron"},
    ),
]


def main() -> None:
    """Run every row and write the table."""
    torch.set_num_threads(1)
    header = "| work | step | ours, s | laplace-torch, s | ratio | largest relative difference |"
    lines = [header, "|---|---|---|---|---|---|"]
    for work in WORKS:
        lines += list(_measured(work))
    text = "\n".join([f"# Beside laplace-torch\n\n{_machine()}\n", *lines, "", _NOTE, ""])
    print(text)
    if len(sys.argv) > 1:
        write_text(Path(sys.argv[1]) / "core.md", text)


def _measured(work: Work) -> Iterator[str]:
    torch.manual_seed(0)
    model = work.network()
    x = torch.randn(_ROWS, *work.shape)
    loader = DataLoader(TensorDataset(x, model(x).detach().argmax(-1)), batch_size=_BATCH)
    queries = torch.randn(work.n_queries, *work.shape)
    rounds = [(_ours(work, model, loader, queries), _theirs(work, model, loader, queries)) for _ in range(_REPEATS)]
    ours, theirs = rounds[-1][0][1], rounds[-1][1][1]
    difference = float(((ours - theirs).abs() / theirs.abs().max()).max())
    for step, name in enumerate(("fit", "first variance", "later variance")):
        a, b = (statistics.median(pair[side][0][step] for pair in rounds) for side in (0, 1))
        yield f"| {work.title} | {name} | {a:.4f} | {b:.4f} | {b / a:.1f} | {difference:.1e} |"


def _ours(
    work: Work, model: nn.Module, loader: DataLoader[tuple[Tensor, ...]], queries: Tensor
) -> tuple[list[float], Tensor]:
    estimator = work.ours(model)
    return _timed(lambda: estimator.fit(loader), lambda: estimator.variance(queries))


def _theirs(
    work: Work, model: nn.Module, loader: DataLoader[tuple[Tensor, ...]], queries: Tensor
) -> tuple[list[float], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from laplace import Laplace

        laplace: Any = Laplace(model, "classification", prior_precision=1.0, **work.theirs)
        return _timed(
            lambda: laplace.fit(loader),
            lambda: laplace._glm_predictive_distribution(queries)[1].diagonal(dim1=1, dim2=2),
        )


def _timed(fit: Callable[[], Any], variance: Callable[[], Tensor]) -> tuple[list[float], Tensor]:
    times = []
    result = torch.empty(0)
    for step in (fit, variance, variance):
        start = time.perf_counter()
        found = step()
        times.append(time.perf_counter() - start)
        result = found if isinstance(found, Tensor) else result
    return times, result.detach()


def _machine() -> str:
    listed = ", ".join(f"{name} {version}" for name, version in environment().items())
    rows = f"{_ROWS} rows in batches of {_BATCH}, 50 queries (CNN: 10)"
    return f"One thread, float32, {rows}, medians of {_REPEATS}; {listed}."


if __name__ == "__main__":
    main()
