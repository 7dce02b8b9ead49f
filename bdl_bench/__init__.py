"""Estimators of predictive uncertainty, compared and verified on one's own model and on bundled tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bdl_bench.problem.problem import Problem

if TYPE_CHECKING:
    from bdl_bench.comparison import compare

__all__ = ["Problem", "compare"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """`compare` on its first use: it brings the report, which takes a second to import."""
    if name == "compare":
        from bdl_bench.comparison import compare

        return compare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
