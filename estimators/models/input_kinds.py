"""Which kinds of inputs each derivative has been compared at."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from estimators.numerics.pytrees import PyTree, Shared

__all__ = ["MOST_KINDS", "InputKinds"]

MOST_KINDS = 1024
"""Kinds that are remembered per derivative. Queries of many lengths have one kind per length.

The oldest kind is forgotten first, and is compared once more if it comes back."""


class InputKinds:
    """Remembers the structure, shapes, dtypes and flags of the inputs of each derivative."""

    def __init__(self) -> None:
        self._kinds: dict[str, dict[object, None]] = {}  # a dict keeps the order of insertion, a set does not

    def add(self, what: str, x: PyTree, *more: object) -> bool:
        """Remember the kind of x for the derivative `what`; return whether it is new.

        Args:
            what: the name of the derivative.
            x: inputs of B rows.
            more: anything else that the kind depends on, such as the number of vectors.
        """
        kinds, kind = self._kinds.setdefault(what, {}), (_kind(x), more)
        if kind in kinds:
            return False
        kinds[kind] = None
        if len(kinds) > MOST_KINDS:
            del kinds[next(iter(kinds))]
        return True

    def remove(self, what: str, x: PyTree) -> None:
        """Forget the kind of x for the derivative `what`.

        Args:
            what: the name of the derivative.
            x: inputs of B rows.
        """
        self._kinds.get(what, {}).pop((_kind(x), ()), None)


def _kind(x: PyTree) -> object:
    """What two inputs that are computed alike have in common: structure, shapes, dtypes, and values of flags."""
    leaves, structure = pytree.tree_flatten(x)
    return str(structure), tuple(_kind_of_leaf(leaf) for leaf in leaves)


def _kind_of_leaf(leaf: object) -> object:
    """The shape, dtype and flags of a tensor; any other leaf as its repr."""
    if isinstance(leaf, Shared):
        return "shared", _kind_of_leaf(leaf.value)
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    flags = (bool(leaf.any()), bool(leaf.all())) if leaf.dtype == torch.bool else None
    return tuple(leaf.shape), leaf.dtype, flags
