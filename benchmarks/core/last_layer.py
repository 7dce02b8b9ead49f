"""The last layer with many outputs, for which a Jacobian (M, C, C·(D+1)) does not fit into memory."""

from __future__ import annotations

from functools import partial

from torch import nn

from bdl_bench.networks.small import mlp
from benchmarks.core.work import GIB, Work
from estimators import LastLayerLaplace

__all__ = ["ROWS"]

_QUERIES = 100


def _last_layer(model: nn.Module, structure: str) -> LastLayerLaplace:
    return LastLayerLaplace(model, "classification", hessian_structure=structure)


def _row(structure: str, width: int, outputs: int, *, covariance: bool = False) -> partial[Work]:
    bias = structure != "kron"  # the two Kronecker forms treat biases differently
    wanted = "covariance" if covariance else "variance"
    return partial(
        Work,
        f"last layer {structure}, D = {width}, C = {outputs}, {wanted}",
        partial(mlp, 64, width, outputs, bias=bias),
        (64,),
        partial(_last_layer, structure=structure),
        {"subset_of_weights": "last_layer", "hessian_structure": structure},
        queries=_QUERIES,
        covariance=covariance,
        peak_goal=GIB,
    )


def _jacobian_bytes(width: int, outputs: int) -> float:
    """Return the bytes of J (M, C, C·(D+1)) at the queries, which laplace-torch always allocates."""
    return 4.0 * _QUERIES * outputs**2 * (width + 1)


ROWS = {
    "last-kron-1000": _row("kron", 128, 1000)(
        goals={"later variance": 500}, their_queries=1, their_bytes=_jacobian_bytes(128, 1000)
    ),
    "last-kron-1000-covariance": _row("kron", 128, 1000, covariance=True)(their_bytes=_jacobian_bytes(128, 1000)),
    "last-kron-100-covariance": _row("kron", 512, 100, covariance=True)(
        goals={"later variance": 2000}, their_queries=50
    ),
    "last-diag-100": _row("diag", 128, 100)(goals={"later variance": 1e4}),
    "last-diag-300": _row("diag", 128, 300)(goals={"later variance": 1e4}, their_queries=10, batch_size=50),
    "last-diag-1000": _row("diag", 128, 1000)(their_bytes=_jacobian_bytes(128, 1000)),
    "last-kron-1000-wide": _row("kron", 512, 1000, covariance=True)(their_bytes=_jacobian_bytes(512, 1000)),
    "last-diag-1000-wide": _row("diag", 512, 1000, covariance=True)(their_bytes=_jacobian_bytes(512, 1000)),
}
