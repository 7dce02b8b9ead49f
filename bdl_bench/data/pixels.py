"""Images stored as bytes and converted to floats per batch, since a memory-mapped file may exceed memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

__all__ = ["Images", "Scale", "batches_of", "shuffled_batches_of"]

Bytes = NDArray[np.uint8]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Images:
    """Images (N, H, W, channels) in bytes, and their classes (N,), or None."""

    pixels: Bytes
    labels: Labels | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def at(self, index: NDArray[np.int64] | slice) -> Images:
        """Return the images with these indices."""
        return Images(self.pixels[index], None if self.labels is None else self.labels[index])

    def unlabelled(self) -> Images:
        """Return the images without classes."""
        return Images(self.pixels)


@dataclass(frozen=True)
class Scale:
    """Standardisation of channels by the mean and standard deviation of the training images."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, images: Images) -> Scale:
        """Return the standardisation of images from histograms of their channels, without a copy in floats."""
        values = np.arange(256) / 255
        counts = np.stack([np.bincount(c.ravel(), minlength=256) for c in np.moveaxis(images.pixels, -1, 0)])
        shares = counts / counts.sum(1, keepdims=True)
        mean = shares @ values
        std = np.sqrt((shares * (values - mean[:, None]) ** 2).sum(1))
        return cls(torch.from_numpy(mean).float(), torch.from_numpy(np.where(std > 0, std, 1.0)).float())

    def __call__(self, pixels: Bytes) -> Tensor:
        """Return bytes (B, H, W, channels) as standardised floats (B, channels, H, W)."""
        x = torch.from_numpy(np.ascontiguousarray(pixels)).float() / 255
        return ((x - self.mean) / self.std).permute(0, 3, 1, 2).contiguous()


class _Scaled(Dataset[object]):
    """Data set indexed by the rows of a batch, with items (x, y), or x alone without labels."""

    def __init__(self, images: Images, scale: Scale) -> None:
        self.images, self.scale = images, scale

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Sequence[int]) -> object:
        chosen = self.images.at(np.asarray(rows, dtype=np.int64))
        x = self.scale(chosen.pixels)
        return x if chosen.labels is None else (x, torch.from_numpy(chosen.labels))


def batches_of(images: Images, scale: Scale, *, batch_size: int = 100) -> DataLoader[object]:
    """Return batches in row order."""
    data = _Scaled(images, scale)
    return DataLoader(data, sampler=BatchSampler(SequentialSampler(data), batch_size, drop_last=False), batch_size=None)


def shuffled_batches_of(images: Images, scale: Scale, *, batch_size: int, seed: int) -> DataLoader[object]:
    """Return batches in another order each pass, for more training rows than the trainer stores and shuffles."""
    data = _Scaled(images, scale)
    order = RandomSampler(data, generator=torch.Generator().manual_seed(seed))
    return DataLoader(data, sampler=BatchSampler(order, batch_size, drop_last=False), batch_size=None)
