"""Comparison and verification of estimators of predictive uncertainty, on custom models and bundled tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bdl_bench.problem.problem import Problem

if TYPE_CHECKING:
    from bdl_bench.comparison import compare

__all__ = ["Problem", "compare"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import `compare` at its first use, since its imports take a second."""
    if name == "compare":
        from bdl_bench.comparison import compare

        return compare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
