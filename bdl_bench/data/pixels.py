"""Images kept as bytes, made floats a batch at a time: the bytes may be a mapped file, larger than memory."""

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
    """Images (N, H, W, channels) in bytes, and their classes (N,) where they are known."""

    pixels: Bytes
    labels: Labels | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def at(self, index: NDArray[np.int64] | slice) -> Images:
        """Some of them."""
        return Images(self.pixels[index], None if self.labels is None else self.labels[index])

    def unlabelled(self) -> Images:
        """The images alone."""
        return Images(self.pixels)


@dataclass(frozen=True)
class Scale:
    """Channels in standard deviations from the mean, both of the training images."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, images: Images) -> Scale:
        """From a histogram of each channel, which is exact and needs no copy in floats."""
        values = np.arange(256) / 255
        counts = np.stack([np.bincount(c.ravel(), minlength=256) for c in np.moveaxis(images.pixels, -1, 0)])
        shares = counts / counts.sum(1, keepdims=True)
        mean = shares @ values
        std = np.sqrt((shares * (values - mean[:, None]) ** 2).sum(1))
        return cls(torch.from_numpy(mean).float(), torch.from_numpy(np.where(std > 0, std, 1.0)).float())

    def __call__(self, pixels: Bytes) -> Tensor:
        """(B, H, W, channels) bytes -> (B, channels, H, W) floats."""
        x = torch.from_numpy(np.ascontiguousarray(pixels)).float() / 255
        return ((x - self.mean) / self.std).permute(0, 3, 1, 2).contiguous()


class _Scaled(Dataset[object]):
    """Indexed by the rows of a whole batch: (x, y), or x alone where there are no labels."""

    def __init__(self, images: Images, scale: Scale) -> None:
        self.images, self.scale = images, scale

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Sequence[int]) -> object:
        chosen = self.images.at(np.asarray(rows, dtype=np.int64))
        x = self.scale(chosen.pixels)
        return x if chosen.labels is None else (x, torch.from_numpy(chosen.labels))


def batches_of(images: Images, scale: Scale, *, batch_size: int = 100) -> DataLoader[object]:
    """Batches in row order."""
    data = _Scaled(images, scale)
    return DataLoader(data, sampler=BatchSampler(SequentialSampler(data), batch_size, drop_last=False), batch_size=None)


def shuffled_batches_of(images: Images, scale: Scale, *, batch_size: int, seed: int) -> DataLoader[object]:
    """Batches in another order each pass: for training on more rows than the trainer keeps and shuffles by itself."""
    data = _Scaled(images, scale)
    order = RandomSampler(data, generator=torch.Generator().manual_seed(seed))
    return DataLoader(data, sampler=BatchSampler(order, batch_size, drop_last=False), batch_size=None)
