"""One seed for everything a block of code draws, with the caller's random state put back afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from estimators.rng import preserved_random_state

__all__ = ["seeded"]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch, numpy and `random` inside the block."""
    with preserved_random_state():
        torch.random.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        yield
