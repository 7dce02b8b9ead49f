"""Preservation and seeding of the global random state, from which a shuffling loader draws."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["member_seeds", "preserved_random_state", "seeded", "seeded_random_state"]


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the states of torch (CPU and started GPUs), numpy and `random` on leaving, whatever happened inside."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def seeded_random_state(seed: int) -> Iterator[None]:
    """Seed the global random states inside the block: initialisations and dropout take no generator.

    The states are restored on leaving.
    """
    with preserved_random_state():
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield


def member_seeds(seed: int, n: int) -> list[int]:
    """Return a seed for each of n members, unrelated for neighbouring `seed`; a larger n extends the list."""
    generator = random.Random(seed)
    return [generator.getrandbits(48) for _ in range(n)]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global random states inside the block, and those of GPUs that start in it, which stay seeded."""
    with seeded_random_state(seed):
        torch.manual_seed(seed)
        yield
