"""Recurrent layers that forward mode can differentiate: the fused kernels of oneDNN and cuDNN have no such rule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["make_differentiable"]


def make_differentiable(module: nn.Module) -> None:
    """Let the plain kernels run in the LSTM, GRU and RNN layers of `module`, in place: the same values to round-off."""
    for layer in module.modules():
        if type(layer) in _PLAIN:
            layer.__class__ = _PLAIN[type(layer)]


@contextmanager
def _plain_kernels() -> Iterator[None]:
    fused: list[Any] = [torch.backends.mkldnn, torch.backends.cudnn]
    enabled = [backend.enabled for backend in fused]
    try:
        for backend in fused:
            backend.enabled = False
        yield
    finally:
        for backend, was in zip(fused, enabled, strict=True):
            backend.enabled = was


class _PlainKernels:
    def forward(self, *arguments: object, **keywords: object) -> object:
        with _plain_kernels():
            return super().forward(*arguments, **keywords)  # type: ignore[misc]


class _LSTM(_PlainKernels, nn.LSTM): ...  # type: ignore[misc]


class _GRU(_PlainKernels, nn.GRU): ...  # type: ignore[misc]


class _RNN(_PlainKernels, nn.RNN): ...  # type: ignore[misc]


_PLAIN: dict[type[nn.Module], type[nn.Module]] = {nn.LSTM: _LSTM, nn.GRU: _GRU, nn.RNN: _RNN}
