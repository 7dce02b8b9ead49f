"""Street View House Numbers, in the MATLAB files of its authors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from bdl_bench.data.folder import Source
from bdl_bench.data.packages import torchvision_datasets
from bdl_bench.data.pixels import Images
from estimators.errors import DataError

__all__ = ["svhn_test"]

_FILE = "test_32x32.mat"


def svhn_test() -> Images:
    """Return the test images (N, 32, 32, 3) and their digits of `SVHN/test_32x32.mat` in the data folder."""
    source = Source("SVHN", [f"SVHN/{_FILE}"], "http://ufldl.stanford.edu/housenumbers/", _download)
    (path,) = source.paths()
    try:
        content = loadmat(path)
        digits = content["y"].astype(np.int64).ravel()
        pixels = content["X"].transpose(3, 0, 1, 2).reshape(len(digits), 32, 32, 3)
    except (MatReadError, KeyError, ValueError, TypeError, OSError) as error:
        raise DataError(
            f"a MATLAB file at {path} with X (32, 32, 3, N) and y (N, 1)",
            received=f"{type(error).__name__}: {error}",
            remedy="remove it, so that it is downloaded again.",
        ) from error
    return Images(np.ascontiguousarray(pixels, dtype=np.uint8), digits % 10)


def _download(into: Path) -> None:
    address, name, digest = torchvision_datasets("svhn").SVHN.split_list["test"]
    torchvision_datasets("utils").download_url(address, str(into / "SVHN"), name, digest)
