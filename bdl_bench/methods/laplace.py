"""Linearized Laplace by structure of the Hessian: over all weights, a subnetwork, and the last layer."""

from __future__ import annotations

from bdl_bench.methods.registry import PRIOR, REFERENCE, Method, preset
from estimators import LastLayerLaplace, LinearizedLaplace
from estimators.baselines import SubnetworkLaplace

_EXACT = "linearized Laplace with the exact, full GGN: the reference variance"
_LAST = "exact Laplace over the last linear layer, in closed form"
_SUBNETWORK = "Laplace with the full GGN of the 1,000 weights of largest marginal variance"
_SAMPLED = "linearized Laplace, K-FAC from one sampled label per row: one backward pass for any number of classes"
_HESSIAN = "linearized Laplace with the exact Hessian; needs a positive definite one"

PRESETS = [
    Method(REFERENCE, _EXACT, preset(LinearizedLaplace), default=True, tuned_option=PRIOR),
    Method("laplace-hessian", _HESSIAN, preset(LinearizedLaplace, curvature="hessian"), tuned_option=PRIOR),
    *(
        Method(
            f"laplace-{structure}",
            f"linearized Laplace, {what}",
            preset(LinearizedLaplace, hessian_structure=structure),
            tuned_option=PRIOR,
        )
        for structure, what in (
            ("kron", "K-FAC: a Kronecker product per layer"),
            ("ekfac", "EKFAC: K-FAC's basis with exact eigenvalues"),
            ("diag", "the diagonal of the GGN"),
            ("lowrank", "the 100 leading eigenvectors of the GGN, plus the prior"),
        )
    ),
    Method(
        "laplace-kron-mc",
        _SAMPLED,
        preset(LinearizedLaplace, seeded=True, hessian_structure="kron", fisher="mc"),
        tuned_option=PRIOR,
    ),
    Method("subnetwork-laplace", _SUBNETWORK, preset(SubnetworkLaplace), tuned_option=PRIOR),
    Method("last-layer-laplace", _LAST, preset(LastLayerLaplace), default=True, tuned_option=PRIOR),
    *(
        Method(
            f"last-layer-laplace-{structure}",
            f"Laplace over the last linear layer, {what}",
            preset(LastLayerLaplace, hessian_structure=structure),
            tuned_option=PRIOR,
        )
        for structure, what in (("kron", "a Kronecker product"), ("diag", "its diagonal"))
    ),
]
