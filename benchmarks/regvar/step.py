"""Costs of the mean-absolute regularizer: a training step relative to a plain one, inference to a forward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdl_bench.networks.resnet import resnet18
from bdl_bench.networks.small import mlp
from benchmarks.clock import interleaved, timed
from benchmarks.networks import convolutional
from benchmarks.records import Measured
from estimators.integrations import RegularizedPair, mean_absolute_penalty

__all__ = ["MODELS", "QUERIES", "measure_step"]

QUERIES = 512
_LAM, _N_DATA, _BATCH, _SHORTEST = 0.1, 1000, 64, 0.5


@dataclass(frozen=True)
class _Case:
    network: Callable[[], nn.Module]
    shape: tuple[int, ...]


MODELS: dict[str, _Case] = {
    "MLP, 64-512-512-10": _Case(lambda: nn.Sequential(nn.Linear(64, 512), nn.Tanh(), mlp(512, 512, 10)), (64,)),
    "CNN, 952k parameters": _Case(convolutional, (3, 32, 32)),
    "ResNet-18, 11M parameters": _Case(resnet18, (3, 32, 32)),
}


def measure_step(name: str) -> Measured:
    """Return seconds of a plain step, a regularized step, a forward pass, and the variance of `RegularizedPair`."""
    torch.manual_seed(0)
    case = MODELS[name]
    model = case.network().eval()
    x, y = torch.randn(_BATCH, *case.shape), torch.randint(0, 10, (_BATCH,))
    plain, regularized = (_trainer(copy.deepcopy(model), x, y, lam) for lam in (0.0, _LAM))
    pair = RegularizedPair(model, copy.deepcopy(model), "classification", lam=_LAM).fit([(x, y)])
    queries = torch.randn(QUERIES, *case.shape)

    def forward() -> None:
        with torch.no_grad():
            model(queries)

    steps = {
        "plain": plain,
        "regularized": regularized,
        "forward": forward,
        "inference": lambda: pair.variance(queries),
    }
    timings = interleaved([_repeated(step) for step in steps.values()], repeats=7)
    return {what: timing.median for what, (timing,) in zip(steps, timings, strict=True)}


def _trainer(model: nn.Module, x: Tensor, y: Tensor, lam: float) -> Callable[[], None]:
    """Return a function that makes one SGD step; with lam > 0 its loss includes the mean-absolute regularizer."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1 / _N_DATA)

    def step() -> None:
        f = model(x)
        loss = F.cross_entropy(f, y)
        if lam:
            loss = loss + mean_absolute_penalty(f, lam=lam, n_data=_N_DATA)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _repeated(step: Callable[[], object]) -> Callable[[], list[float]]:
    """Return a function that returns the seconds of one call, averaged over calls that take about half a second."""
    calls = max(1, round(_SHORTEST / max(timed(step), timed(step), 1e-6)))

    def timed_calls() -> list[float]:
        return [timed(lambda: [step() for _ in range(calls)]) / calls]

    return timed_calls
