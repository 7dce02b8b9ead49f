"""Application of a function to many rows: by vmap, or in a loop if vmap does not support the function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.func import vmap
from torch.utils import _pytree as pytree

from estimators.errors import EstimatorError
from estimators.numerics.pytrees import PyTree, n_rows, row_dims, select_rows
from estimators.numerics.tracing import is_tracing

__all__ = ["one_by_one", "over_rows"]


def over_rows(function: Callable[..., PyTree], *arguments: PyTree, chunk_size: int | None = None) -> PyTree:
    """Apply a function to each row of the arguments, pytrees of tensors with rows first, and stack the outputs.

    Leaves without rows (a shared tensor, a number, a flag) are passed unchanged to every call.
    Forwards that branch on the values of their inputs (the padding masks of Hugging Face encoders) or write in place
    (recurrent layers) fail inside vmap and work row by row. A single row needs no vmap, whose set-up takes longer than
    the forward of a small network. A row is recorded for an exported module without vmap, too, which would hide from a
    forward that it is recorded.
    """
    if is_tracing() or n_rows(arguments) == 1:
        return one_by_one(function, arguments)
    try:
        return vmap(function, in_dims=row_dims(arguments), chunk_size=chunk_size)(*arguments)
    except EstimatorError:
        raise
    except RuntimeError:
        return one_by_one(function, arguments)


def one_by_one(function: Callable[..., PyTree], arguments: tuple[PyTree, ...]) -> PyTree:
    """Apply a function to each row of the arguments in a loop, and stack the outputs."""

    def row(i: int) -> PyTree:
        return function(*select_rows(arguments, i))

    results = [row(i) for i in range(n_rows(arguments))]
    return pytree.tree_map(lambda *leaves: torch.stack(leaves), *results)
