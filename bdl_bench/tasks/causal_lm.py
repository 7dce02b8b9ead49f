"""Characters of English text about software, one after the other: a language model small enough for exact references.

Source: docstrings of the standard library (PSF license), whatever version of Python runs.
Size: an alphabet of 32 characters (lower case, digits all 0, what is left ?); windows of 24 characters, each of a
different sentence. Split: 384 train, 60 validation and 150 test windows, drawn by the seed.
Training labels are all 23 characters that follow another. Scored are the last 4 of a validation or test window.
Shift: typos-1 ... typos-5, 5, 10, 20, 35 and 50 % of the characters before those 4 replaced by random ones.
Out of distribution: 60 windows of Python source code, from the standard library too.
Model: GPT-2 with 2 layers, width 12, 3 heads, embedding and head not tied; 4,848 parameters, float32, no dropout.
Prior precision δ = 10, fixed, not tuned.
Recipe: Adam, 60 epochs, batches of 32, learning rate 0.01, cosine.
"""

from __future__ import annotations

import importlib
import inspect
import string
from functools import cache

import torch
from torch import Tensor, nn

from bdl_bench.data.pretrained import package
from bdl_bench.problem.problem import Loader, Problem
from bdl_bench.tasks.library_text import sentences
from bdl_bench.tasks.registry import register
from bdl_bench.tasks.split import split_indices
from estimators.training.training import Recipe

__all__ = ["make_problem"]

_MODULES = (
    *("unittest.case", "unittest.mock", "email.message", "asyncio.tasks", "asyncio.base_events", "threading"),
    *("pathlib", "shutil", "tarfile", "zipfile", "argparse", "http.client", "urllib.request", "logging"),
)
_ALPHABET = "?\n .0_" + string.ascii_lowercase
_TOKENS, _SCORED = 24, 4
_TRAIN, _VALIDATION, _TEST, _OOD = 384, 60, 150, 60
_TYPOS = (0.05, 0.10, 0.20, 0.35, 0.50)


@register("causal-lm", needs='the extra "text"')
def make_problem(seed: int) -> Problem:
    """Causal language model: characters of sentences about software, GPT-2 of 4,848 weights, 384 training windows."""
    generator = torch.Generator().manual_seed(seed)
    windows = _windows(sentences(_MODULES), _TRAIN + _VALIDATION + _TEST, generator)
    train, validation, test = (
        windows[i] for i in split_indices(len(windows), train=_TRAIN, validation=_VALIDATION, seed=seed)
    )
    ood = _windows(_source_lines(), _OOD, generator)
    shifts = {f"typos-{i}": _scored(_with_typos(test, rate, generator)) for i, rate in enumerate(_TYPOS, start=1)}
    return Problem(
        _network(),
        "causal_lm",
        _training(train),
        _scored(validation),
        _scored(test),
        prior_precision=10.0,
        recipe=Recipe(epochs=60, batch_size=32, optimizer="adam", lr=1e-2, schedule="cosine"),
        make_model=_network,
        ood={"source-code": _scored(ood)},
        shifts=shifts,
    )


def _network() -> nn.Module:
    transformers = package("transformers", extra="text")
    size = {"vocab_size": len(_ALPHABET), "n_positions": _TOKENS, "n_embd": 12, "n_layer": 2, "n_head": 3}
    separate = {"tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0}
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(**size, **no_dropout, **separate)
    config._attn_implementation = "eager"
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def _training(windows: Tensor) -> Loader:
    """Return batches to train on, with a label at every position."""
    return [{"input_ids": ids, "labels": ids} for ids in windows.split(32)]


def _scored(windows: Tensor) -> Loader:
    """Return batches to score: the model gives logits at the last positions only, of which the very last is unused."""
    keep = _SCORED + 1
    return [{"input_ids": ids, "logits_to_keep": keep, "labels": ids[:, -keep:]} for ids in windows.split(50)]


def _windows(texts: list[str], n: int, generator: torch.Generator) -> Tensor:
    """Return n distinct windows (n, T) of different texts, at random positions."""
    found: dict[tuple[int, ...], None] = {}
    for i in torch.randperm(len(texts), generator=generator).tolist():
        codes = _codes(texts[i])
        start = int(torch.randint(len(codes) - _TOKENS + 1, (), generator=generator))
        found[tuple(codes[start : start + _TOKENS])] = None
        if len(found) == n:
            break
    return torch.tensor(list(found))


def _codes(text: str) -> list[int]:
    plain = ("0" if character.isdigit() else character for character in text.lower())
    return [max(0, _ALPHABET.find(character)) for character in plain]


def _with_typos(windows: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Return the windows with a share of the characters before the scored ones replaced."""
    replaced = torch.rand(windows.shape, generator=generator) < rate
    replaced[:, -_SCORED:] = False
    return torch.where(replaced, torch.randint(len(_ALPHABET), windows.shape, generator=generator), windows)


@cache
def _source_lines() -> list[str]:
    """Return lines of code of the same modules, without indentation, comments and docstrings."""
    source = "\n".join(inspect.getsource(importlib.import_module(name)) for name in _MODULES)
    lines = {" ".join(line.split()) for line in source.splitlines() if line.startswith(" ") and "(" in line}
    return sorted(line for line in lines if len(line) >= _TOKENS and line.endswith(("):", ")")) and "#" not in line)
