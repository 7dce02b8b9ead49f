"""What a case is, how one is registered, and the inputs that several cases share."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Any
Data = Callable[[torch.Generator], tuple[list[Inputs], Inputs]]

SIZES = (7, 12, 5)  # rows of the batches: unequal, and special rows begin in the second


@dataclass(frozen=True)
class Case:
    """A small float64 network, the inputs of its training batches, and queries.

    `expects` says what an estimator has to do: "answer", "raise" (raise one of `estimators.errors`), or "answer or
    raise". Whatever is answered has to be right, to `tolerance` of the largest variance.
    """

    name: str
    kind: str
    model: nn.Module
    batches: list[Inputs]
    queries: Inputs
    n_outputs: int
    expects: str = "answer"
    tolerance: float = 1e-6


BUILDERS: dict[str, Callable[[], Case]] = {}


def network(
    data: Data, *, outputs: int = 2, expects: str = "answer", name: str | None = None, tolerance: float = 1e-6
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Register a class or function that makes a network. Each build gives new objects with equal numbers."""
    if expects not in ("answer", "raise", "answer or raise"):
        raise ValueError(expects)

    def register(factory: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", factory.__name__)
        title = name or words.replace("_", "-").lower().strip("-")
        if title in BUILDERS:
            raise ValueError(f"two networks are named {title}")
        kind = factory.__module__.rpartition(".")[2]

        def build() -> Case:
            seed = zlib.crc32(title.encode())
            with float64_default(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = factory().eval()
                batches, queries = data(torch.Generator().manual_seed(seed))
            return Case(title, kind, model, batches, queries, outputs, expects, tolerance)

        BUILDERS[title] = build
        return factory

    return register


@contextmanager
def float64_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def in_batches(x: Inputs, sizes: tuple[int, ...] = SIZES) -> list[Inputs]:
    """Consecutive rows of a tensor or of a dict of tensors."""
    if isinstance(x, dict):
        parts = {key: value.split(sizes) for key, value in x.items()}
        return [{key: part[i].clone() for key, part in parts.items()} for i in range(len(sizes))]
    return [part.clone() for part in x.split(sizes)]


def vectors(features: int = 4, *, new: int = 3, special: Callable[[Tensor], None] | None = None) -> Data:
    """Normal vectors. `special` changes rows 9, 14 and 20, none of them in the first batch; 14 is a query, too."""

    def data(generator: torch.Generator) -> tuple[list[Inputs], Inputs]:
        x = torch.randn(sum(SIZES), features, generator=generator)
        if special is not None:
            for row in (9, 14, 20):
                special(x[row])
        queries = torch.cat([x[13:15], torch.randn(new, features, generator=generator)])
        return in_batches(x), queries

    return data


def tokens(length: int = 6, vocabulary: int = 30, *, padded: bool = True) -> Data:
    """Token ids (B, T) of 1 … vocabulary − 1, 0 where padded; every row has at least one token."""

    def data(generator: torch.Generator) -> tuple[list[Inputs], Inputs]:
        n = sum(SIZES) + 3
        ids = torch.randint(1, vocabulary, (n, length), generator=generator)
        if padded:
            ids[torch.arange(length) >= torch.randint(1, length + 1, (n, 1), generator=generator)] = 0
        return in_batches(ids[:-3]), ids[[9, 14, -3, -2, -1]]

    return data


def images(channels: int = 1, side: int = 6) -> Data:
    return shaped(channels, side, side)


def shaped(*shape: int) -> Data:
    """Normal inputs (B, *shape)."""

    def data(generator: torch.Generator) -> tuple[list[Inputs], Inputs]:
        x = torch.randn(sum(SIZES) + 3, *shape, generator=generator)
        return in_batches(x[:-3]), x[[9, 14, -3, -2, -1]].clone()

    return data


def masked(features: int, mask_shape: tuple[int, ...], mask_name: str, fill: Callable[[Tensor], None]) -> Data:
    """{"x": (B, [T,] features), mask_name: bool}, `fill` marks entries in place, none of them in the first batch."""

    def data(generator: torch.Generator) -> tuple[list[Inputs], Inputs]:
        n = sum(SIZES)
        x = torch.randn(n, *mask_shape[:-1], features, generator=generator)
        mask = torch.zeros(n, *mask_shape, dtype=torch.bool)
        fill(mask)
        inputs = {"x": x, mask_name: mask}
        return in_batches(inputs), {key: value[[8, 9, 14, 20, 2]].clone() for key, value in inputs.items()}

    return data
