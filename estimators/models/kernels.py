"""Kernels that every transform can differentiate: attention by its formula, compiled functions as plain Python."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["differentiable", "eager"]


@contextmanager
def eager() -> Iterator[None]:
    """Run `torch.compile`d functions uncompiled; costs nothing if nothing was compiled in this process."""
    if "torch._dynamo" not in sys.modules or torch.compiler.is_compiling():
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def differentiable() -> Iterator[None]:
    """Run attention by kernels that forward mode and vmap can differentiate; restore the settings afterwards.

    Inside another such context of this thread, the settings are those already.
    """
    if _IN_USE.depth:
        yield
        return
    _load_forward_rules()
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    _IN_USE.depth += 1
    try:
        with sdpa_kernel(SDPBackend.MATH), eager():
            yield
    finally:
        _IN_USE.depth -= 1
        torch.backends.mha.set_fastpath_enabled(fastpath)


class _InUse(threading.local):
    """How many contexts of `differentiable` a thread is in."""

    depth = 0


_IN_USE = _InUse()


@cache
def _load_forward_rules() -> None:
    """Use forward mode once without warnings: the first use compiles torch's own rules by a deprecated call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))
