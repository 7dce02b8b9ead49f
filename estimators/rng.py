"""The global random state, kept as it was: a loader that shuffles draws from it, and so changes later numbers."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["preserved_random_state"]


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the states of torch (CPU and started GPUs), numpy and `random` on leaving, whatever happened inside."""
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy else None
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)
