"""Hessian structures over all weights of a convolutional network."""

from __future__ import annotations

from functools import partial

from torch import nn

from benchmarks.core.work import Work
from benchmarks.networks import convolutional
from estimators import LinearizedLaplace

__all__ = ["ROWS"]


def _structured(model: nn.Module, structure: str) -> LinearizedLaplace:
    return LinearizedLaplace(model, "classification", hessian_structure=structure)


def _row(structure: str, goal: float, *, bias: bool) -> Work:
    n = sum(p.numel() for p in convolutional(bias=bias).parameters())
    return Work(
        f"all-weights {structure}, CNN, P = {n:,}, C = 10",
        partial(convolutional, bias=bias),
        (3, 32, 32),
        partial(_structured, structure=structure),
        {"subset_of_weights": "all", "hessian_structure": structure},
        goals={"later variance": goal},
        queries=10,
    )


ROWS = {
    "kron-cnn": _row("kron", 200, bias=False),  # the two forms treat biases differently
    "diag-cnn": _row("diag", 40, bias=True),
}
