"""Recurrent layers that forward mode can differentiate, without the fused kernels of oneDNN and cuDNN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["use_plain_recurrent_kernels"]


def use_plain_recurrent_kernels(module: nn.Module) -> None:
    """Use plain kernels in the LSTM, GRU and RNN layers of `module`, in place; values agree to round-off.

    Subclasses of these layers stay as they are, since they may override what the plain kernels need.
    """
    for layer in module.modules():
        if type(layer) in _PLAIN:
            layer.__class__ = _PLAIN[type(layer)]


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Disable the fused kernels: they have no rule for forward mode."""
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
    """A recurrent layer whose forward uses plain kernels."""

    def forward(self, *arguments: object, **keywords: object) -> object:
        with _plain_kernels():
            return super().forward(*arguments, **keywords)  # type: ignore[misc]


class _LSTM(_PlainKernels, nn.LSTM): ...  # type: ignore[misc]


class _GRU(_PlainKernels, nn.GRU): ...  # type: ignore[misc]


class _RNN(_PlainKernels, nn.RNN): ...  # type: ignore[misc]


_PLAIN: dict[type[nn.Module], type[nn.Module]] = {nn.LSTM: _LSTM, nn.GRU: _GRU, nn.RNN: _RNN}
