"""Linearized Laplace, exact and by structure, over all weights, some of them, and over the last layer."""

from __future__ import annotations

from bdl_bench.methods.registry import PRIOR, REFERENCE, Method, preset
from estimators import LastLayerLaplace, LinearizedLaplace
from estimators.baselines import SubnetworkLaplace

_EXACT = "linearized Laplace with the exact, full GGN: the reference variance"
_LAST = "exact Laplace over the last linear layer, in closed form"
_SUBNETWORK = "Laplace with the full GGN of the 1,000 single weights of largest marginal variance"
_HESSIAN = "linearized Laplace with the exact Hessian; needs a positive definite one"

PRESETS = [
    Method(REFERENCE, _EXACT, preset(LinearizedLaplace), default=True, axis=PRIOR),
    Method("laplace-hessian", _HESSIAN, preset(LinearizedLaplace, curvature="hessian"), axis=PRIOR),
    *(
        Method(
            f"laplace-{structure}",
            f"linearized Laplace, {what}",
            preset(LinearizedLaplace, hessian_structure=structure),
            axis=PRIOR,
        )
        for structure, what in (
            ("kron", "K-FAC: a Kronecker product a layer"),
            ("ekfac", "EKFAC: K-FAC's basis with exact eigenvalues"),
            ("diag", "the diagonal of the GGN"),
            ("lowrank", "the 100 leading directions of the GGN beside the prior"),
        )
    ),
    Method("subnetwork-laplace", _SUBNETWORK, preset(SubnetworkLaplace), axis=PRIOR),
    Method("last-layer-laplace", _LAST, preset(LastLayerLaplace), default=True, axis=PRIOR),
    *(
        Method(
            f"last-layer-{structure}",
            f"Laplace over the last linear layer, {what}",
            preset(LastLayerLaplace, hessian_structure=structure),
            axis=PRIOR,
        )
        for structure, what in (("kron", "a Kronecker product"), ("diag", "its diagonal"))
    ),
]
