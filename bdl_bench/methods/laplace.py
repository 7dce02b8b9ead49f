"""Linearized Laplace, exact and by structure, over all weights and over the last layer."""

from __future__ import annotations

from bdl_bench.methods.registry import PRIOR, REFERENCE, Build, Method, preset
from estimators import LastLayerLaplace, LinearizedLaplace
from estimators.baselines import SubnetworkLaplace


def _method(name: str, summary: str, build: Build, *, default: bool = False) -> Method:
    return Method(name, summary, build, default=default, axis=PRIOR)


PRESETS = [
    _method(
        REFERENCE,
        "linearized Laplace with the exact, full GGN: the reference variance",
        preset(LinearizedLaplace),
        default=True,
    ),
    _method(
        "laplace-hessian",
        "linearized Laplace with the exact Hessian; needs a positive definite one",
        preset(LinearizedLaplace, curvature="hessian"),
    ),
    _method(
        "laplace-kron",
        "linearized Laplace, K-FAC: a Kronecker product a layer",
        preset(LinearizedLaplace, hessian_structure="kron"),
    ),
    _method(
        "laplace-ekfac",
        "linearized Laplace, EKFAC: K-FAC's basis with exact eigenvalues",
        preset(LinearizedLaplace, hessian_structure="ekfac"),
    ),
    _method(
        "laplace-diag",
        "linearized Laplace, the diagonal of the GGN",
        preset(LinearizedLaplace, hessian_structure="diag"),
    ),
    _method(
        "laplace-lowrank",
        "linearized Laplace, the 100 leading directions of the GGN beside the prior",
        preset(LinearizedLaplace, hessian_structure="lowrank"),
    ),
    _method(
        "subnetwork",
        "Laplace with the full GGN of the 1,000 single weights of largest marginal variance",
        preset(SubnetworkLaplace),
    ),
    _method(
        "last-layer",
        "exact Laplace over the last linear layer, in closed form",
        preset(LastLayerLaplace),
        default=True,
    ),
    _method(
        "last-layer-kron",
        "Laplace over the last linear layer, a Kronecker product",
        preset(LastLayerLaplace, hessian_structure="kron"),
    ),
    _method(
        "last-layer-diag",
        "Laplace over the last linear layer, its diagonal",
        preset(LastLayerLaplace, hessian_structure="diag"),
    ),
]
