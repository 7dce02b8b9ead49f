"""Inputs as pytrees: a tensor, or dicts, lists and tuples of tensors and constants, and which of them have rows.

A tensor of a batch of B rows either has rows (its first dimension is B) or is shared by them: position ids (1, T), an
edge list (2, E), a time without dimensions. `RowLayout` finds the shared tensors over all batches of a data set and
wraps them in `Shared`. Every function here then takes rows of the plain tensors and keeps the rest whole: `Shared`
tensors, tensors without dimensions, numbers, strings and flags.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from estimators.errors import DataError

__all__ = [
    "ALL_ROWS",
    "PyTree",
    "RowLayout",
    "Shared",
    "concatenate",
    "copied",
    "difference",
    "forward_arguments",
    "n_rows",
    "plain_inputs",
    "row_as_batch",
    "row_dims",
    "row_tensors",
    "select_rows",
    "split_rows",
    "tensors_of",
    "with_floats",
]

PyTree: TypeAlias = Any


@dataclass(frozen=True, eq=False)
class Shared:
    """A tensor that all rows of a batch share; for pytrees a leaf that is no tensor, so that no row is taken of it."""

    value: Tensor


@dataclass(frozen=True)
class RowLayout:
    """Which tensors of the inputs have rows, learned from the batches of a data set.

    A tensor is shared if its first dimension differs from the number of rows B in any batch. One of length 1 may be
    either, since models broadcast it: it is shared unless it has B rows in another batch. Where all batches have the
    same B, shapes do not tell a shared tensor of that length from one with rows: it is taken to have rows, unless
    `estimators.data.batch_dimension` finds otherwise.

    Args:
        unequal: paths of the tensors whose first dimension was neither B nor 1 in some batch.
        single: paths of those whose first dimension was 1 in some batch of more than one row.
        with_rows: paths of those whose first dimension was B in some batch of more than one row.
        lists: paths of lists of B Python values in some batch of more than one row.
        other_lists: paths of lists of Python values of another length.
        sizes: the numbers of rows of the batches of more than one.

    Example:
        >>> layout = RowLayout().observe({"x": torch.zeros(4, 3), "positions": torch.zeros(1, 3)}, 4)
        >>> layout.shared
        frozenset({"['positions']"})
    """

    unequal: frozenset[str] = frozenset()
    single: frozenset[str] = frozenset()
    with_rows: frozenset[str] = frozenset()
    lists: frozenset[str] = frozenset()
    other_lists: frozenset[str] = frozenset()
    sizes: frozenset[int] = frozenset()

    @property
    def shared(self) -> frozenset[str]:
        """Paths of the tensors that are shared in every batch."""
        return self.unequal | (self.single - self.with_rows)

    def observe(self, x: PyTree, rows: int) -> RowLayout:
        """Return the layout after one more batch, of `rows` rows; raise DataError if no tensor has as many rows."""
        lengths = {path: len(leaf) for path, leaf in _leaves(plain_inputs(x)) if _has_rows(leaf)}
        if rows not in lengths.values():
            raise _no_rows(lengths, rows)
        lists = {path: len(node) for path, node in _leaves(x, is_leaf=_is_plain_list) if _is_plain_list(node)}
        return RowLayout(
            self.unequal | {path for path, n in lengths.items() if n not in (rows, 1)},
            self.single | {path for path, n in lengths.items() if n == 1 != rows},
            self.with_rows | {path for path, n in lengths.items() if n == rows != 1},
            self.lists | {path for path, n in lists.items() if n == rows != 1},
            self.other_lists | {path for path, n in lists.items() if n != rows},
            self.sizes | ({rows} - {1}),
        )

    def check_lists(self) -> None:
        """Raise DataError for a list of Python values that is as long as the batch in every batch."""
        for path in sorted(self.lists - self.other_lists):
            raise DataError(
                "tensors for what differs between rows",
                received=f"a list of Python values at {path}, as many as rows in every batch",
                remedy="make it a tensor in the collate function, torch.tensor(values); text as token ids. A sequence "
                "that all rows share may be a tuple.",
            )

    def mark(self, x: PyTree, rows: int | None = None) -> PyTree:
        """The inputs with their shared tensors wrapped in `Shared`.

        Args:
            x: inputs of a batch or a query; marked inputs are returned as they are.
            rows: the number of rows; None: the length that the tensors which are not shared have in common.

        Raises:
            DataError: the number of rows is not given, and tensors disagree about it.
        """
        shared = self.shared
        if rows is None:
            rows = _common_length({path: len(t) for path, t in _leaves(x) if path not in shared and _has_rows(t)})

        def marked(path: Any, leaf: Any) -> Any:  # noqa: ANN401
            if not isinstance(leaf, Tensor):
                return leaf
            whole = leaf.ndim == 0 or len(leaf) != rows or pytree.keystr(path) in shared
            return Shared(leaf) if whole else leaf

        return pytree.tree_map_with_path(marked, x)


ALL_ROWS = RowLayout()
"""The layout of inputs of which every tensor has rows."""


def forward_arguments(x: PyTree) -> tuple[tuple[PyTree, ...], dict[str, PyTree]]:
    """Return the arguments and keywords of a forward: a dict is passed by keywords; `Shared` is unwrapped."""
    x = plain_inputs(x)
    return ((), x) if isinstance(x, dict) else ((x,), {})


def plain_inputs(x: PyTree) -> PyTree:
    """Return the inputs as the user passed them, with shared tensors unwrapped."""
    return pytree.tree_map_only(Shared, lambda leaf: leaf.value, x)


def tensors_of(tree: PyTree) -> list[Tensor]:
    """Return the tensors in a pytree in a fixed order, shared tensors included."""
    leaves = (leaf.value if isinstance(leaf, Shared) else leaf for leaf in pytree.tree_leaves(tree))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def row_tensors(tree: PyTree) -> list[Tensor]:
    """Return the tensors in a pytree that have rows, in a fixed order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if _has_rows(leaf)]


def n_rows(tree: PyTree) -> int:
    """Return the length of the first dimension of the first tensor with rows; 0 if there is none."""
    tensors = row_tensors(tree)
    return tensors[0].shape[0] if tensors else 0  # len() would fix the number of rows of an exported module


def row_as_batch(row: PyTree) -> PyTree:
    """Return one row, as seen inside a vmap, as a batch of one row."""
    return pytree.tree_map_only(Tensor, lambda t: t.unsqueeze(0), row)


def row_dims(tree: PyTree) -> PyTree:
    """`in_dims` of a vmap over rows: 0 in place of each tensor with rows, None in place of all else."""
    return pytree.tree_map(lambda leaf: 0 if _has_rows(leaf) else None, tree)


def with_floats(tree: PyTree, dtype: torch.dtype) -> PyTree:
    """Return the pytree with its floating-point tensors in a dtype."""

    def converted(leaf: Tensor | Shared) -> Tensor | Shared:
        if isinstance(leaf, Shared):
            return Shared(leaf.value.to(dtype)) if leaf.value.is_floating_point() else leaf
        return leaf.to(dtype) if leaf.is_floating_point() else leaf

    return pytree.tree_map_only((Tensor, Shared), converted, tree)


def copied(tree: PyTree) -> PyTree:
    """Return a copy of the pytree that shares no memory with the original."""

    def copy(leaf: Tensor | Shared) -> Tensor | Shared:
        return Shared(leaf.value.detach().clone()) if isinstance(leaf, Shared) else leaf.detach().clone()

    return pytree.tree_map_only((Tensor, Shared), copy, tree)


def select_rows(tree: PyTree, index: Tensor | slice | int) -> PyTree:
    """Return the rows at `index` of every tensor with rows; all else whole."""
    return pytree.tree_map_only(Tensor, lambda t: t[index] if t.ndim else t, tree)


def split_rows(tree: PyTree, size: int) -> list[PyTree]:
    """Split into consecutive parts of at most `size` rows; each part has everything that the rows share."""
    total = n_rows(tree)
    return [select_rows(tree, slice(start, min(start + size, total))) for start in range(0, total, size)]


def concatenate(trees: Sequence[PyTree]) -> PyTree:
    """Concatenate pytrees along rows; raise DataError if they differ in anything but their rows."""
    received = difference(trees)
    if received is not None:
        raise DataError(
            "batches that differ in nothing but their rows, to join them",
            received=received,
            remedy="leave the batches apart, or give every row its own entry: t.expand(len(x)) for a number t.",
        )
    return pytree.tree_map(lambda *leaves: torch.cat(leaves) if _has_rows(leaves[0]) else leaves[0], *trees)


def difference(trees: Sequence[PyTree]) -> str | None:
    """Return why pytrees cannot be joined along rows, in words; None if they can."""
    flat = [_leaves(tree) for tree in trees]
    if len({pytree.tree_structure(tree) for tree in trees}) > 1:
        return "batches of different structure"
    for (path, first), *others in zip(*flat, strict=True):
        name = f"the entry {path}" if path else "the inputs"
        for _, other in others:
            if _has_rows(first) != _has_rows(other):
                return f"{name} with rows in one batch and shared by the rows in another"
            if _has_rows(first):
                if (first.shape[1:], first.dtype, first.device) != (other.shape[1:], other.dtype, other.device):
                    return f"{name} of shape {tuple(first.shape)} and {first.dtype} in one batch, of shape " + (
                        f"{tuple(other.shape)} and {other.dtype} in another"
                    )
            elif not _same(first, other):
                return f"{name}, which rows share, with different values in different batches"
    return None


def _same(first: Any, other: Any) -> bool:  # noqa: ANN401
    """Return whether two leaves without rows are equal."""
    first, other = (leaf.value if isinstance(leaf, Shared) else leaf for leaf in (first, other))
    if isinstance(first, Tensor) and isinstance(other, Tensor):
        alike = (first.shape, first.dtype, first.device) == (other.shape, other.dtype, other.device)
        return alike and torch.equal(first, other)
    return first is other or (type(first) is type(other) and bool(first == other))


def _has_rows(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0


def _is_plain_list(node: object) -> bool:
    """A list of numbers or strings."""
    return isinstance(node, list) and bool(node) and all(isinstance(v, (int, float, complex, str)) for v in node)


def _leaves(tree: PyTree, is_leaf: Callable[[PyTree], bool] | None = None) -> list[tuple[str, Any]]:
    """Leaves with their paths as text: "['mask']", "[0]", or "" for the tree itself."""
    return [(pytree.keystr(path), leaf) for path, leaf in pytree.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]]


def _common_length(lengths: dict[str, int]) -> int:
    """Return the number of rows of a query; tensors of length 1 besides longer ones are broadcast."""
    found = set(lengths.values())
    if len(found) > 1:
        found.discard(1)
    if len(found) > 1:
        listed = ", ".join(f"{path} {n}" for path, n in lengths.items())
        raise DataError(
            "inputs whose tensors have one number of rows, except for those that rows share",
            received=f"first dimensions of different length: {listed}",
            remedy="put the rows first in every tensor; batches of several sizes show which tensors the rows share.",
        )
    return found.pop() if found else 0


def _no_rows(lengths: dict[str, int], rows: int) -> DataError:
    listed = ", ".join(f"{path or 'x'} {n}" for path, n in lengths.items()) or "none"
    return DataError(
        f"inputs with a tensor that has a row for each of the {rows} targets",
        received=f"first dimensions {listed}",
        remedy="check how the loader pairs inputs and targets; put rows first (transpose inside forward), and pad what "
        "is packed into one long tensor, such as the nodes of several graphs, to (B, ...) with a mask.",
    )
