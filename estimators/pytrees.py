"""Inputs as pytrees: a tensor, or dicts, lists and tuples of tensors, whose first dimension counts rows."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["PyTree", "concatenate", "n_rows", "row_as_batch", "select_rows", "split_rows", "tensors_of", "with_floats"]

PyTree: TypeAlias = Any


def tensors_of(tree: PyTree) -> list[Tensor]:
    """The tensors in a pytree, in a fixed order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def n_rows(tree: PyTree) -> int:
    """The length of the first dimension of the first tensor; 0 where there is none."""
    tensors = tensors_of(tree)
    return int(tensors[0].shape[0]) if tensors and tensors[0].ndim else 0


def row_as_batch(row: PyTree) -> PyTree:
    """One row, as it looks inside a vmap, made a batch of one."""
    return pytree.tree_map_only(Tensor, lambda t: t.unsqueeze(0), row)


def with_floats(tree: PyTree, dtype: torch.dtype) -> PyTree:
    """The pytree with its floating-point tensors in a dtype."""
    return pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, tree)


def select_rows(tree: PyTree, index: Tensor | slice) -> PyTree:
    """The rows at `index` of every tensor."""
    return pytree.tree_map_only(Tensor, lambda t: t[index], tree)


def split_rows(tree: PyTree, size: int) -> list[PyTree]:
    """Consecutive pieces of at most `size` rows."""
    total = n_rows(tree)
    return [select_rows(tree, slice(start, min(start + size, total))) for start in range(0, total, size)]


def concatenate(trees: list[PyTree]) -> PyTree:
    """Pytrees of one structure, joined along rows."""
    return pytree.tree_map(lambda *leaves: torch.cat(leaves) if isinstance(leaves[0], Tensor) else leaves[0], *trees)
