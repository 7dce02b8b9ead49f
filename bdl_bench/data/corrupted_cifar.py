"""CIFAR-10-C: test images of CIFAR-10 under fifteen corruptions, five severities (Hendrycks & Dietterich 2019)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bdl_bench.data.folder import Source
from bdl_bench.data.packages import torchvision_datasets
from bdl_bench.data.pixels import Images
from estimators.errors import DataError

__all__ = ["CORRUPTIONS", "corrupted_cifar10"]

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
"""The fifteen corruptions that the benchmark averages; four others in the archive are for tuning."""

_FOLDER, _SEVERITIES = "CIFAR-10-C", 5
_URL = "https://zenodo.org/records/2535967/files/CIFAR-10-C.tar?download=1"
_MD5 = "56bf5dcef84df0e2308c6dcbcbbd8499"


def corrupted_cifar10(n: int) -> dict[str, Images]:
    """Return the first `n` test images of each set, by "<corruption>-<severity>", of `CIFAR-10-C/*.npy`.

    A file contains the severities one after the other. It is memory-mapped, so that unused rows are not read.
    """
    files = [f"{_FOLDER}/{name}.npy" for name in (*CORRUPTIONS, "labels")]
    *paths, labels_path = Source("CIFAR-10-C", files, "https://zenodo.org/records/2535967", _download).paths()
    labels = _mapped(labels_path).astype(np.int64)
    sets = {}
    for corruption, path in zip(CORRUPTIONS, paths, strict=True):
        pixels = _mapped(path)
        if pixels.shape != (len(labels), 32, 32, 3) or pixels.dtype != np.uint8:
            raise _unreadable(path, f"{pixels.dtype} of shape {pixels.shape} beside {len(labels)} labels")
        for severity, start in enumerate(range(0, len(labels), len(labels) // _SEVERITIES), start=1):
            rows = slice(start, start + min(n, len(labels) // _SEVERITIES))
            sets[f"{corruption}-{severity}"] = Images(pixels[rows], labels[rows])
    return sets


def _download(into: Path) -> None:
    utils = torchvision_datasets("utils")
    utils.download_and_extract_archive(_URL, str(into), filename="CIFAR-10-C.tar", md5=_MD5, remove_finished=True)


def _mapped(path: Path) -> NDArray[np.uint8]:
    try:
        array: NDArray[np.uint8] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise _unreadable(path, f"{type(error).__name__}: {error}") from error
    return array


def _unreadable(path: Path, received: str) -> DataError:
    return DataError(
        f"an array of bytes (50000, 32, 32, 3), or labels (50000,), at {path}",
        received=received,
        remedy="remove it, so that it is downloaded again.",
    )
