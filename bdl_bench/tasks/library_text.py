"""English text by topic: the docstrings of the standard library.

Source: the Python Software Foundation (PSF license). The sentences depend slightly on the version of Python.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["TOPICS", "as_characters", "labelled_sentences", "sentences"]

TOPICS: dict[str, tuple[str, ...]] = {
    "unittest": ("unittest.case", "unittest.mock"),
    "email": ("email.message", "email.headerregistry", "email.policy", "email.charset"),
    "concurrency": (
        "multiprocessing.managers",
        "multiprocessing.pool",
        "asyncio.tasks",
        "asyncio.base_events",
        "concurrent.futures",
        "threading",
    ),
}
"""Modules by topic: three classes of sentences with the same style and different subjects."""

_SHORTEST, _LONGEST = 40, 200


def sentences(modules: Sequence[str]) -> list[str]:
    """Return sentences of 40 to 200 characters in the docstrings of public classes, methods and functions, sorted."""
    found = set()
    for name in modules:
        for text in _docstrings(importlib.import_module(name)):
            for sentence in re.split(r"(?<=[.])\s+|\n\n", text):
                joined = " ".join(sentence.split())
                if _SHORTEST <= len(joined) <= _LONGEST:
                    found.add(joined)
    return sorted(found)


def labelled_sentences(per_topic: int, *, seed: int = 0) -> tuple[list[str], Tensor]:
    """Return sentences of three topics and their labels.

    Args:
        per_topic: the largest number of sentences per topic: the first ones in alphabetical order.
        seed: seed of the order in which all sentences are then shuffled.

    Returns:
        N sentences, and the index of the topic of each, (N,).
    """
    rows = [(text, label) for label, modules in enumerate(TOPICS.values()) for text in sentences(modules)[:per_topic]]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[i][0] for i in order], torch.tensor([rows[i][1] for i in order])


def as_characters(texts: Sequence[str], length: int) -> Tensor:
    """Return the texts joined by newlines as rows of ASCII codes, (N, length); an incomplete last row is dropped."""
    codes = torch.tensor(list("\n".join(texts).encode("ascii", "replace")))
    return codes[: len(codes) // length * length].reshape(-1, length)


def _docstrings(module: ModuleType) -> Iterator[str]:
    family = module.__name__.split(".", maxsplit=1)[0]
    for _, thing in sorted(vars(module).items()):
        if not (inspect.isclass(thing) or inspect.isfunction(thing)) or not thing.__module__.startswith(family):
            continue
        methods = [m for _, m in sorted(vars(thing).items()) if inspect.isfunction(m)] if inspect.isclass(thing) else []
        yield from filter(None, (inspect.getdoc(each) for each in (thing, *methods) if each.__doc__))
