"""Data files and weights in installed packages, found without importing the packages, and arrays computed once."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from bdl_bench.data.folder import MissingDataError, cache_folder
from estimators.persistence.atomic import write_bytes
from estimators.persistence.checksums import digest

__all__ = ["computed_once", "package_file", "package_folder"]


def package_folder(module: str) -> Path | None:
    """Return the folder of an installed package, which is not imported; None if it is not installed.

    Args:
        module: the name that Python imports, such as "mlxtend" or "orangecontrib.text".
    """
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of a parent package
        return None
    if found is None or not found.submodule_search_locations:
        return None
    return Path(next(iter(found.submodule_search_locations)))


def package_file(module: str, file: str, *, install: str) -> Path:
    """Return the path of a file in an installed package.

    Args:
        module: the name that Python imports.
        file: relative to the folder of the package.
        install: what brings it, such as 'pip install "bdl-bench[data]"'.

    Raises:
        MissingDataError: if the package or the file is missing; it says what to install.
    """
    folder = package_folder(module)
    path = None if folder is None else folder / file
    if path is None or not path.is_file():
        raise MissingDataError(
            f"{file} in the package {module}",
            received="no such package" if folder is None else f"no such file in {folder}",
            remedy=f"{install}.",
        )
    return path


def computed_once(name: str, inputs: list[bytes | str | Tensor], compute: Callable[[], Tensor]) -> Tensor:
    """Return `compute()`, stored under the cache folder, so that processes and later runs have the same bits.

    Args:
        name: of the file.
        inputs: everything that the result depends on; other inputs are another file.
        compute: function that returns a tensor. Other processes wait for it.
    """
    path = cache_folder() / "computed" / f"{name}-{digest(*inputs).hex()[:16]}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            buffer = io.BytesIO()
            np.save(buffer, compute().detach().cpu().numpy(), allow_pickle=False)
            write_bytes(path, buffer.getvalue())
    return torch.from_numpy(np.load(path, allow_pickle=False))
