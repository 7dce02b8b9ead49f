"""Street View House Numbers, in the MATLAB files of its authors."""

from __future__ import annotations

import numpy as np
from scipy.io import loadmat

from bdl_bench.data.folder import Source, reading
from bdl_bench.data.pixels import Images

__all__ = ["svhn_test"]

_PAGE = "http://ufldl.stanford.edu/housenumbers/"
_FILE = "test_32x32.mat"


def svhn_test() -> Images:
    """Return the test images (N, 32, 32, 3) and their digits of `SVHN/test_32x32.mat` in the data folder."""
    downloads = {f"{_PAGE}{_FILE}": "md5:eb5a983be6a315427106f1b164d9cef3"}
    (path,) = Source("SVHN", [f"SVHN/{_FILE}"], _PAGE, downloads).paths()
    with reading(path, "a MATLAB file with X (32, 32, 3, N) and y (N, 1)"):
        content = loadmat(path)
        digits = content["y"].astype(np.int64).ravel()
        pixels = content["X"].transpose(3, 0, 1, 2).reshape(len(digits), 32, 32, 3)
    return Images(np.ascontiguousarray(pixels, dtype=np.uint8), digits % 10)
