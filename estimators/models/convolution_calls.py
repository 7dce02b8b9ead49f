"""Convolutions in 1, 2 or 3 dimensions as linear maps of the patch of inputs at every output position.

A convolution applies one matrix, its weight as (O, C·k), to the patch of each output position. A transposed convolution
is the convolution of its input, with stride − 1 zeros between neighbours, with the reversed kernel. Therefore it has
patches too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["CONVOLUTIONS", "ConvolutionPatches"]

_Size = int | Sequence[int]


@dataclass(frozen=True)
class ConvolutionPatches:
    """One call of a convolution.

    Attributes:
        weight: the weight.
        bias: the bias, or None.
        patches: makes the patches (T, C·k), T counting the output positions of all images of the call.
        dimensions: the number of dimensions of the kernel, 1 to 3.
        transposed: whether the weight is stored as (C, O, *kernel).
    """

    weight: Tensor
    bias: Tensor | None
    patches: Callable[[], Tensor]
    dimensions: int
    transposed: bool = False

    @property
    def n_kernel(self) -> int:
        """k, the number of entries of the kernel."""
        return math.prod(self.weight.shape[2:])

    @property
    def n_outputs(self) -> int:
        """O, the number of output channels."""
        return self.weight.shape[1 if self.transposed else 0]

    @property
    def n_inputs(self) -> int:
        """C·k, the number of entries of a patch."""
        return self.weight.numel() // self.n_outputs


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Size = 1,
    padding: _Size | str = 0,
    dilation: _Size = 1,
    groups: int = 1,
) -> ConvolutionPatches | None:
    """A call of torch.conv1d, conv2d or conv3d; None if it is grouped: groups have different inputs."""
    if groups != 1:
        return None
    n = weight.ndim - 2
    strides, dilations, kernel = _each(stride, n), _each(dilation, n), weight.shape[2:]
    if isinstance(padding, str):
        extent = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        pads = [(e // 2, e - e // 2) if padding == "same" else (0, 0) for e in extent]
    else:
        pads = [(p, p) for p in _each(padding, n)]

    def patches() -> Tensor:
        return _patches(_padded(_batched(input, n), pads), kernel, strides, dilations)

    return ConvolutionPatches(weight, bias, patches, n)


def _transposed(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Size = 1,
    padding: _Size = 0,
    output_padding: _Size = 0,
    groups: int = 1,
    dilation: _Size = 1,
) -> ConvolutionPatches | None:
    """A call of torch.conv_transpose1d, 2d or 3d; None if it is grouped."""
    if groups != 1:
        return None
    n = weight.ndim - 2
    strides, dilations, kernel = _each(stride, n), _each(dilation, n), weight.shape[2:]
    before = [d * (k - 1) - p for d, k, p in zip(dilations, kernel, _each(padding, n), strict=True)]
    pads = [(b, b + more) for b, more in zip(before, _each(output_padding, n), strict=True)]

    def patches() -> Tensor:
        spread = _with_zeros_between(_batched(input, n), strides)
        reversed_patches = _patches(_padded(spread, pads), kernel, [1] * n, dilations).unflatten(1, (-1, *kernel))
        found: Tensor = reversed_patches.flip(list(range(2, 2 + n))).flatten(1)
        return found

    return ConvolutionPatches(weight, bias, patches, n, transposed=True)


CONVOLUTIONS: dict[Callable[..., Any], Callable[..., ConvolutionPatches | None]] = {
    getattr(library, f"{name}{n}d"): patches_of
    for library in (torch, F)
    for name, patches_of in (("conv", _convolution), ("conv_transpose", _transposed))
    for n in (1, 2, 3)
}
"""Readers of a call, by the function that is called."""


def _each(size: _Size, n: int) -> list[int]:
    """A size as n numbers, one per dimension."""
    numbers = [size] if isinstance(size, int) else list(size)
    return numbers * n if len(numbers) == 1 else numbers


def _batched(input: Tensor, n: int) -> Tensor:
    """Images as (B, C, *space), also a single one (C, *space)."""
    return input if input.ndim == n + 2 else input.unsqueeze(0)


def _padded(images: Tensor, pads: list[tuple[int, int]]) -> Tensor:
    """Pad images by zeros before and after each dimension of space; negative numbers crop."""
    if not any(map(any, pads)):
        return images
    return F.pad(images, [number for pad in reversed(pads) for number in pad])


def _with_zeros_between(images: Tensor, strides: list[int]) -> Tensor:
    """Insert stride − 1 zeros between neighbours along each dimension of space."""
    for dim, stride in enumerate(strides, 2):
        if stride > 1:
            zeros = torch.zeros_like(images).unsqueeze(dim + 1)
            spread = torch.cat([images.unsqueeze(dim + 1), *[zeros] * (stride - 1)], dim + 1).flatten(dim, dim + 1)
            images = spread.narrow(dim, 0, spread.shape[dim] - stride + 1)
    return images


def _patches(images: Tensor, kernel: Sequence[int], strides: list[int], dilations: list[int]) -> Tensor:
    """Patches (B·T, C·k) of images (B, C, *space)."""
    n = len(kernel)
    if n == 2:
        return F.unfold(images, tuple(kernel), tuple(dilations), 0, tuple(strides)).transpose(1, 2).flatten(0, 1)
    for dim, (k, s, d) in enumerate(zip(kernel, strides, dilations, strict=True), 2):
        images = images.unfold(dim, d * (k - 1) + 1, s)[..., ::d]
    order = [0, *range(2, 2 + n), 1, *range(2 + n, 2 + 2 * n)]  # (B, C, *T, *k) -> (B, *T, C, *k)
    return images.permute(order).flatten(1 + n).flatten(0, n)
