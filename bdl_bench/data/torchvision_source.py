"""torchvision, imported where its readers or its downloads are wanted."""

from __future__ import annotations

import importlib
from typing import Any

from estimators.errors import UnsupportedError

__all__ = ["torchvision_datasets"]


def torchvision_datasets(module: str) -> Any:  # noqa: ANN401
    """The module torchvision.datasets.<module>; where torchvision does not import, what to install."""
    try:
        return importlib.import_module(f"torchvision.datasets.{module}")
    except (ImportError, RuntimeError) as error:
        raise UnsupportedError(
            "a torchvision that imports, of the build of this torch",
            received=f"{type(error).__name__}: {error}",
            remedy="pip install torchvision, with torch and torchvision both for CPU or both for the same CUDA.",
        ) from error
