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
_Steps = tuple[list[tuple[int, int]], list[int], list[int]]


@dataclass(frozen=True)
class ConvolutionPatches:
    """One call of a convolution.

    Attributes:
        weight: the weight.
        bias: the bias, or None.
        input: the images of the call, (B, C, *space), or a single one (C, *space).
        patches_of: makes the patches (T, C·k) of images, T counting the output positions of all of them.
        applied: applies the convolution, with the options of the call, to images and a weight.
        dimensions: the number of dimensions of the kernel, 1 to 3.
        steps: padding before and after, stride and dilation in each dimension; None if sums have no short cut.
        transposed: whether the weight is stored as (C, O, *kernel).
    """

    weight: Tensor
    bias: Tensor | None
    input: Tensor
    patches_of: Callable[[Tensor], Tensor]
    applied: Callable[[Tensor, Tensor], Tensor]
    dimensions: int
    steps: _Steps | None = None
    transposed: bool = False

    def positions(self) -> Tensor:
        """The patches (T, C·k) of all images of the call."""
        return self.patches_of(self.input)

    def of_rows(self, rows: slice | Tensor) -> Tensor:
        """The patches (M, T, C·k) at the output positions of some of the images."""
        images = self.input[rows]
        patches: Tensor = self.patches_of(images).unflatten(0, (len(images), -1))
        return patches

    def summed(self) -> Tensor:
        """The sum of the patches over the output positions of each image, (B, C·k)."""
        if self.steps is None:
            return self.of_rows(slice(None)).sum(1)
        return _summed_patches(self.input, self.weight.shape[2:], self.steps)

    def products(self, vectors: Tensor) -> Tensor:
        """The products with vectors (n, C·k) of the patch at every output position of each image, (B, T, n)."""
        kernels = vectors.unflatten(1, (-1, *self.weight.shape[2:]))
        kernels = kernels.transpose(0, 1) if self.transposed else kernels
        return self.applied(self.input, kernels).flatten(2).transpose(1, 2)

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

    def patches(images: Tensor) -> Tensor:
        return _patches(_padded(_batched(images, n), pads), kernel, strides, dilations)

    def applied(images: Tensor, kernels: Tensor) -> Tensor:
        return _function("conv", n)(images, kernels, None, stride, padding, dilation)

    return ConvolutionPatches(weight, bias, input, patches, applied, n, (pads, strides, dilations))


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

    def patches(images: Tensor) -> Tensor:
        spread = _with_zeros_between(_batched(images, n), strides)
        reversed_patches = _patches(_padded(spread, pads), kernel, [1] * n, dilations).unflatten(1, (-1, *kernel))
        found: Tensor = reversed_patches.flip(list(range(2, 2 + n))).flatten(1)
        return found

    def applied(images: Tensor, kernels: Tensor) -> Tensor:
        options = (stride, padding, output_padding, 1, dilation)
        return _function("conv_transpose", n)(images, kernels, None, *options)

    return ConvolutionPatches(weight, bias, input, patches, applied, n, transposed=True)


CONVOLUTIONS: dict[Callable[..., Any], Callable[..., ConvolutionPatches | None]] = {
    getattr(library, f"{name}{n}d"): patches_of
    for library in (torch, F)
    for name, patches_of in (("conv", _convolution), ("conv_transpose", _transposed))
    for n in (1, 2, 3)
}
"""Readers of a call, by the function that is called."""


def _function(name: str, n: int) -> Callable[..., Tensor]:
    """The convolution of a name in n dimensions."""
    found: Callable[..., Tensor] = getattr(F, f"{name}{n}d")
    return found


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


def _summed_patches(images: Tensor, kernel: Sequence[int], steps: _Steps) -> Tensor:
    """The sum of the patches over the output positions of each image, (B, C·k), without the patches.

    Along one dimension, an entry e of the kernel sees pixel i at output t if i + padding = stride·t + dilation·e. The
    sum over t is the product with a matrix (size, k) of ones and zeros.
    """
    sums = images
    for dim, (k, (before, after), s, d) in reversed(list(enumerate(zip(kernel, *steps, strict=True), 2))):
        size = images.shape[dim]
        n_positions = (size + before + after - d * (k - 1) - 1) // s + 1
        pixels, entries = torch.arange(size, device=images.device), torch.arange(k, device=images.device)
        offset = pixels[:, None] + before - d * entries
        seen = (offset >= 0) & (offset % s == 0) & (offset < s * n_positions)
        sums = (sums.movedim(dim, -1) @ seen.to(images)).movedim(-1, dim)
    return sums.flatten(1)
