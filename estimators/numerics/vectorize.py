"""One function at many rows: by vmap, or one row after another where the function cannot be vectorised."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.func import vmap
from torch.utils import _pytree as pytree

from estimators.errors import EstimatorError
from estimators.numerics.pytrees import PyTree, n_rows, row_dims, select_rows

__all__ = ["one_by_one", "over_rows"]


def over_rows(function: Callable[..., PyTree], *arguments: PyTree, chunk_size: int | None = None) -> PyTree:
    """`function` of each row of the arguments, pytrees of tensors with rows in front; outputs stacked likewise.

    What is no tensor with rows (a shared tensor, a number, a flag) is the same for every row.
    Forwards that branch on the values of their inputs (the padding masks of Hugging Face encoders) or write in place
    (recurrent layers) fail inside vmap and work row by row.
    """
    try:
        return vmap(function, in_dims=row_dims(arguments), chunk_size=chunk_size)(*arguments)
    except EstimatorError:
        raise
    except RuntimeError:
        return one_by_one(function, arguments)


def one_by_one(function: Callable[..., PyTree], arguments: tuple[PyTree, ...]) -> PyTree:
    """`function` of each row of the arguments in a loop; outputs stacked."""

    def row(i: int) -> PyTree:
        return function(*select_rows(arguments, i))

    results = [row(i) for i in range(n_rows(arguments))]
    return pytree.tree_map(lambda *leaves: torch.stack(leaves), *results)
