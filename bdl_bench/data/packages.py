"""Packages of the extras, imported when a task needs them."""

from __future__ import annotations

from typing import Any

from estimators.runtime.optional import optional_module

__all__ = ["package", "torchvision_datasets"]


def package(module: str, *, extra: str) -> Any:  # noqa: ANN401
    """Import a module of a package in this extra. Raises UnsupportedError, which names the extra, if it is missing."""
    return optional_module(module, purpose="make this task or method", install=f'"bdl-bench[{extra}]"')


def torchvision_datasets(module: str) -> Any:  # noqa: ANN401
    """Import the module torchvision.datasets.<module>. Raises UnsupportedError if it is missing."""
    both = "torchvision, with torch and torchvision both for CPU or both for the same CUDA"
    return optional_module(f"torchvision.datasets.{module}", purpose="read this data set", install=both)
