"""Comparison and verification of estimators of predictive uncertainty, on custom models and bundled tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bdl_bench.comparison import compare
    from bdl_bench.problem.problem import Problem

__all__ = ["Problem", "compare"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import the public names at their first use: they import PyTorch, which `bdl-bench --help` does without."""
    if name == "compare":
        from bdl_bench.comparison import compare

        return compare
    if name == "Problem":
        from bdl_bench.problem.problem import Problem

        return Problem
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
