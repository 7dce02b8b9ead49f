"""MNIST and FashionMNIST, in the idx files of their authors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from bdl_bench.data.folder import Source
from bdl_bench.data.packages import torchvision_datasets
from bdl_bench.data.pixels import Images
from estimators.errors import DataError

__all__ = ["mnist_like"]

_ADDRESSES = {
    "MNIST": "http://yann.lecun.com/exdb/mnist/",
    "FashionMNIST": "https://github.com/zalandoresearch/fashion-mnist",
}
_PREFIXES = {"train": "train", "test": "t10k"}


def mnist_like(name: str, part: str) -> Images:
    """Return the "train" or "test" images (N, 28, 28, 1) of `<name>/raw/`, the name "MNIST" or "FashionMNIST"."""
    files = [f"{name}/raw/{_PREFIXES[part]}-{kind}" for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    paths = Source(name, files, _ADDRESSES[name], _download(name)).paths()
    readers = torchvision_datasets("mnist")
    pixels, labels = _read(readers.read_image_file, paths[0]), _read(readers.read_label_file, paths[1])
    if len(pixels) != len(labels):
        raise _unreadable(paths[1], f"{len(labels)} labels beside {len(pixels)} images")
    return Images(pixels.unsqueeze(-1).numpy(), labels.numpy().astype(np.int64))


def _download(name: str) -> Callable[[Path], None]:
    def download(into: Path) -> None:
        getattr(torchvision_datasets("mnist"), name)(into, download=True)

    return download


def _read(reader: Callable[[str], Tensor], path: Path) -> Tensor:
    try:
        return reader(str(path))
    except (ValueError, TypeError, AssertionError, RuntimeError, IndexError) as error:
        raise _unreadable(path, f"{type(error).__name__}: {error}") from error


def _unreadable(path: Path, received: str) -> DataError:
    return DataError(
        f"bytes in the idx format, images (N, 28, 28) or labels (N,), at {path}",
        received=received,
        remedy="remove it, so that it is downloaded again.",
    )
