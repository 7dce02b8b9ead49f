"""Laplace approximations of laplace-torch, as a cross-check."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from typing import Any

from bdl_bench.methods.registry import PRIOR, Build, Method, preset
from bdl_bench.problem.problem import Problem
from estimators import UncertaintyEstimator
from estimators.baselines import LaplaceTorch
from estimators.errors import UnsupportedError


def _laplace_torch(**options: Any) -> Build:  # noqa: ANN401
    build = preset(LaplaceTorch, **options)

    def checked(problem: Problem, seed: int) -> UncertaintyEstimator:
        if problem.likelihood.kind == "binary" or isinstance(problem.prior_precision, dict):
            raise UnsupportedError(
                "regression or classes, and one prior_precision, which is what laplace-torch takes",
                received=f"{problem.likelihood!r}, prior_precision={problem.prior_precision!r}",
                remedy="laplace, laplace-kron, laplace-diag and last-layer-laplace take all of them.",
            )
        with suppress(
            ImportError, RuntimeError
        ):  # imported here, so that the fit is timed without it; the fit reports a missing package
            import_module("laplace")
        return build(problem, seed)

    return checked


PRESETS = [
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
