"""Preservation and seeding of the global random state, from which a shuffling loader draws."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["member_seeds", "preserved_random_state", "seeded", "seeded_random_state"]


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


@contextmanager
def seeded_random_state(seed: int) -> Iterator[None]:
    """Seed the global random states inside the block: initialisations and dropout take no generator.

    The states are restored on leaving.
    """
    numpy = sys.modules.get("numpy")
    with preserved_random_state():
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)
        random.seed(seed)
        if numpy:
            numpy.random.seed(seed % 2**32)
        yield


def member_seeds(seed: int, n: int) -> list[int]:
    """Return a seed for each of n members, unrelated for neighbouring `seed`; a larger n extends the list."""
    generator = random.Random(seed)
    return [generator.getrandbits(48) for _ in range(n)]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch, numpy and `random` inside the block."""
    with preserved_random_state():
        torch.random.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        yield
