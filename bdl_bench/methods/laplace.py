"""Linearized Laplace over all weights, a subnetwork and the last layer, and that of laplace-torch as a cross-check."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from typing import Any

from bdl_bench.methods.registry import ADAPTERS, PRIOR, REFERENCE, Build, Method, check_adapters, preset
from bdl_bench.problem.problem import Problem
from estimators import LastLayerLaplace, LinearizedLaplace, UncertaintyEstimator
from estimators.baselines import LaplaceTorch, SubnetworkLaplace
from estimators.errors import UnsupportedError

_EXACT = "linearized Laplace with the exact, full GGN: the reference variance"
_LAST = "exact Laplace over the last linear layer, in closed form"
_SUBNETWORK = "Laplace with the full GGN of the 1,000 weights of largest marginal variance"
_SAMPLED = "linearized Laplace, K-FAC from one sampled label per row: one backward pass for any number of classes"
_HESSIAN = "linearized Laplace with the exact Hessian; needs a positive definite one"


def _laplace_lora(problem: Problem, seed: int) -> UncertaintyEstimator:
    """Return K-FAC over the adapters alone with the exact Fisher, as in Yang et al. (2024), section 3."""
    check_adapters("laplace-lora", problem)
    build = preset(LinearizedLaplace, hessian_structure="kron", fisher="exact", subset_of_weights=[ADAPTERS])
    return build(problem, seed)


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
    Method(
        "laplace-lora",
        "Laplace-LoRA: linearized Laplace, K-FAC, over the weights of LoRA adapters alone",
        _laplace_lora,
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


def _laplace_torch(**options: Any) -> Build:  # noqa: ANN401
    build = preset(LaplaceTorch, **options)

    def checked(problem: Problem, seed: int) -> UncertaintyEstimator:
        if problem.likelihood.kind == "binary" or isinstance(problem.prior_precision, dict):
            raise UnsupportedError(
                "regression or classes, and one prior_precision, which is what laplace-torch takes",
                received=f"{problem.likelihood!r}, prior_precision={problem.prior_precision!r}",
                remedy="laplace, laplace-kron, laplace-diag and last-layer-laplace take all of them.",
            )
        with suppress(ImportError, RuntimeError):  # here, so that the fit is timed without it; the fit reports its lack
            import_module("laplace")
        return build(problem, seed)

    return checked


LAPLACE_TORCH = [
    Method(name, f"laplace-torch: {what}", _laplace_torch(**options), tuned_option=PRIOR)
    for name, what, options in (
        ("laplace-torch", "the full GGN", {"hessian_structure": "full", "backend": "BackPackGGN"}),
        ("laplace-torch-kron", "its Kronecker factors of all weights", {"hessian_structure": "kron"}),
        ("laplace-torch-diag", "its diagonal of all weights", {"hessian_structure": "diag", "backend": "BackPackGGN"}),
        (
            "laplace-torch-last-layer",
            "the full GGN of the last layer",
            {"hessian_structure": "full", "subset_of_weights": "last_layer"},
        ),
    )
]
