"""Estimators of predictive uncertainty, compared and verified on one's own model and on bundled tasks."""

from bdl_bench.problem import Problem

__all__ = ["Problem"]
