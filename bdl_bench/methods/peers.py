"""laplace-torch's own computations, as a cross-check of ours."""

from __future__ import annotations

from bdl_bench.methods.registry import PRIOR, Method, preset
from estimators.baselines import LaplaceTorch

PRESETS = [
    Method(name, f"laplace-torch: {what}", preset(LaplaceTorch, **options), axis=PRIOR)
    for name, what, options in (
        ("laplace-torch", "the full GGN", {"hessian_structure": "full"}),
        ("laplace-torch-kron", "its Kronecker factors of all weights", {"hessian_structure": "kron"}),
        ("laplace-torch-diag", "its diagonal of all weights", {"hessian_structure": "diag"}),
        (
            "laplace-torch-last-layer",
            "the full GGN of the last layer",
            {"hessian_structure": "full", "subset_of_weights": "last_layer"},
        ),
    )
]
