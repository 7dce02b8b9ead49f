"""Packages of the extras, imported where a task wants them: an error that names the extra where one is missing."""

from __future__ import annotations

import importlib
from typing import Any

from estimators.errors import UnsupportedError

__all__ = ["package"]


def package(module: str, *, extra: str) -> Any:  # noqa: ANN401
    """The module, of a package in this extra. Errors: UnsupportedError where it does not import."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnsupportedError(
            f"the package {module.partition('.')[0]}, of the extra {extra!r}",
            received=f"{type(error).__name__}: {error}",
            remedy=f'pip install "bdl-bench[{extra}]".',
        ) from error
