"""CIFAR-10, in the batches that its authors pickled."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from bdl_bench.data.folder import Source, reading
from bdl_bench.data.pixels import Images

__all__ = ["cifar10"]

_SERVER, _FOLDER = "https://www.cs.toronto.edu/~kriz", "cifar-10-batches-py"
_DOWNLOADS = {f"{_SERVER}/cifar-10-python.tar.gz": "md5:c58f30108f718f92721af3b95e74349a"}
_PARTS = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),  # pickles of Python 2 hold the bytes of an array as text
}


def cifar10(part: str) -> Images:
    """Return the "train" or "test" images (N, 32, 32, 3) of `cifar-10-batches-py/` in the data folder."""
    files = [f"{_FOLDER}/{name}" for name in _PARTS[part]]
    paths = Source("CIFAR-10", files, f"{_SERVER}/cifar.html", _DOWNLOADS).paths()
    batches = [_read(path) for path in paths]
    pixels = np.concatenate([pixels for pixels, _ in batches])
    return Images(pixels, np.concatenate([labels for _, labels in batches]))


def _read(path: Path) -> tuple[Any, Any]:
    with reading(path, 'a batch of CIFAR-10, a pickled dict with "data" (n, 3072) and "labels"'):
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="latin1").load()
        flat, labels = np.asarray(content["data"]), np.asarray(content["labels"], dtype=np.int64)
        return flat.reshape(len(labels), 3, 32, 32).transpose(0, 2, 3, 1).astype(np.uint8, casting="safe"), labels


class _ArraysOnly(pickle.Unpickler):
    """An unpickler of plain values and numpy arrays, which rejects every other name: a pickle may run any code."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a batch of images")
        return super().find_class(module, name)
