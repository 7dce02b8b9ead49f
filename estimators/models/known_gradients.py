"""A cache of gradients by plain autograd, for the self-check of a fit.

The self-check compares derivatives with plain autograd on the user's module. A fit compares several kinds of products
(J v, Jᵀu, rows of J, features of a last layer) at the same batches. One gradient g = Jᵀu per batch serves all of them,
as long as the gradients together take little memory.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from estimators.numerics.pytrees import PyTree, Shared
from estimators.persistence.checksums import digest

__all__ = ["KnownGradients"]

_MOST_BYTES = 2**28
"""Memory of the cache, 256 MiB. Further batches are differentiated once per kind of product."""


class KnownGradients:
    """Pairs of u and g = Jᵀu, by the content of the batch."""

    def __init__(self) -> None:
        self._pairs: dict[bytes, tuple[Tensor, Tensor]] = {}
        self._bytes = 0

    def key(self, x: PyTree) -> bytes:
        """A digest of the batch x, by which its pair is found; it reads all of x."""
        return _digest(x)

    def cotangent(self, x: PyTree) -> Tensor | None:
        """u (B, C) of an earlier comparison at x, or None. With the same u its gradient need not be computed again."""
        pair = self._pairs.get(self.key(x)) if self._pairs else None
        return None if pair is None else pair[0]

    def gradient(self, key: bytes, u: Tensor) -> Tensor | None:
        """g (P,) for exactly this u (B, C) at the batch of `key`, or None."""
        pair = self._pairs.get(key)
        return pair[1] if pair is not None and torch.equal(pair[0], u.to(pair[0])) else None

    def keep(self, key: bytes, u: Tensor, g: Tensor) -> None:
        """Keep copies of u (B, C) and g (P,), if the batch is new and the memory allows."""
        size = u.nbytes + g.nbytes
        if key not in self._pairs and self._bytes + size <= _MOST_BYTES:
            self._bytes += size
            self._pairs[key] = u.detach().clone(), g.detach().clone()


def _digest(x: PyTree) -> bytes:
    """Return a digest of the structure of x and of all of its numbers."""
    leaves, structure = pytree.tree_flatten(x)
    parts: list[str | Tensor] = [str(structure)]
    for item in leaves:
        leaf = item.value if isinstance(item, Shared) else item
        parts += [f"{tuple(leaf.shape)} {leaf.dtype}", leaf] if isinstance(leaf, Tensor) else [repr(leaf)]
    return digest(*parts)
