"""CIFAR-10-C: test images of CIFAR-10 under fifteen corruptions, five severities (Hendrycks & Dietterich 2019)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bdl_bench.data.folder import Source, reading
from bdl_bench.data.pixels import Images

__all__ = ["CORRUPTIONS", "corrupted_cifar10"]

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
"""The fifteen corruptions that the benchmark averages; four others in the archive are for tuning."""

_FOLDER, _SEVERITIES = "CIFAR-10-C", 5
_PAGE = "https://zenodo.org/records/2535967"
_DOWNLOADS = {f"{_PAGE}/files/CIFAR-10-C.tar?download=1": "md5:56bf5dcef84df0e2308c6dcbcbbd8499"}
_EXPECTED = "an array of bytes (50000, 32, 32, 3), or labels (50000,),"


def corrupted_cifar10(n: int) -> dict[str, Images]:
    """Return the first `n` test images of each set, by "<corruption>-<severity>", of `CIFAR-10-C/*.npy`.

    A file contains the severities one after the other. It is memory-mapped, so that unused rows are not read.
    """
    files = [f"{_FOLDER}/{name}.npy" for name in (*CORRUPTIONS, "labels")]
    *paths, labels_path = Source("CIFAR-10-C", files, _PAGE, _DOWNLOADS).paths()
    labels = _mapped(labels_path).astype(np.int64)
    sets = {}
    for corruption, path in zip(CORRUPTIONS, paths, strict=True):
        pixels = _mapped(path)
        with reading(path, _EXPECTED):
            if pixels.shape != (len(labels), 32, 32, 3) or pixels.dtype != np.uint8:
                raise ValueError(f"{pixels.dtype} of shape {pixels.shape} beside {len(labels)} labels")
        for severity, start in enumerate(range(0, len(labels), len(labels) // _SEVERITIES), start=1):
            rows = slice(start, start + min(n, len(labels) // _SEVERITIES))
            sets[f"{corruption}-{severity}"] = Images(pixels[rows], labels[rows])
    return sets


def _mapped(path: Path) -> NDArray[np.uint8]:
    with reading(path, _EXPECTED):
        array: NDArray[np.uint8] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array
