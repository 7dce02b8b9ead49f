"""One step of a grid, wherever an executor has put it: a value, which the process of the grid writes.

This module does once what others do at their first use, so that no cell's seconds hold them; import it where work is
done, and not before.
"""

from __future__ import annotations

from typing import TypeAlias

import backpack  # noqa: F401
import torch._dynamo  # noqa: F401  by the first optimizer of a process

from bdl_bench.cells import Cell, Measured, measure
from bdl_bench.maps import Place, Trained, prepare
from estimators.network import differentiable

__all__ = ["Item", "work"]

with differentiable():  # compiles the rules of forward mode
    pass

Item: TypeAlias = Place | Cell


def work(item: Item) -> Trained | Measured:
    """Train a network, or measure a method on it."""
    return prepare(item) if isinstance(item, Place) else measure(item)
