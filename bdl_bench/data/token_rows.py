"""Texts as rows of tokens of one length, truncated or padded, with a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bdl_bench.problem.problem import Loader
from estimators.errors import DataError

__all__ = ["TokenRows", "drawn_rows"]

_IGNORED = -100


@dataclass(frozen=True)
class TokenRows:
    """The first tokens of each text: `ids` and `mask` (N, T), the mask 1, and 0 for padding, which is on the right."""

    ids: Tensor
    mask: Tensor

    @classmethod
    def of(cls, texts: list[str], tokenizer: Any, length: int) -> TokenRows:  # noqa: ANN401
        """Return the rows of texts by a tokenizer of transformers, padded by its padding token or its end of text."""
        rows = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
        padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        ids = torch.full((len(rows), length), padding)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        return cls(ids, mask)

    def __len__(self) -> int:
        return len(self.ids)

    def classified(self, labels: Tensor, *, batch_size: int) -> Loader:
        """Return batches for a classifier of texts, with the class of each row; `labels` are (N,)."""
        return self._batches({"input_ids": self.ids, "attention_mask": self.mask, "labels": labels}, batch_size)

    def training(self, *, batch_size: int) -> Loader:
        """Return batches to train a causal model on: tokens are their own labels, padding has none."""
        return self.classified(torch.where(self.mask.bool(), self.ids, _IGNORED), batch_size=batch_size)

    def scored(self, n: int, *, batch_size: int) -> Loader:
        """Return batches to score a causal model by the last n tokens of each row.

        `logits_to_keep`, an argument of the models of transformers, limits the logits to the last n + 1 positions. The
        last of them predicts no token of the row.

        Raises:
            DataError: for rows with padding.
        """
        if not bool(self.mask.all()):
            raise DataError("rows without padding", received="some that are shorter", remedy="longer texts only.")
        positions = n + 1
        labelled = self._batches({"input_ids": self.ids, "labels": self.ids[:, -positions:]}, batch_size)
        return [{**batch, "logits_to_keep": positions} for batch in labelled]

    def _batches(self, columns: dict[str, Tensor], size: int) -> Loader:
        batches = zip(*(column.split(size) for column in columns.values()), strict=True)
        return [dict(zip(columns, batch, strict=True)) for batch in batches]


def drawn_rows(table: Any, n: int, seed: int, *, least_words: int = 1) -> Any:  # noqa: ANN401
    """Return n rows of a table with a column "text", or all if there are fewer, in an order drawn by the seed.

    Texts of fewer words than `least_words` (titles, empty lines) are skipped.
    """
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen: list[int] = []
    for i in order:
        if len(chosen) == n:
            break
        if len(table[i]["text"].split()) >= least_words:
            chosen.append(i)
    return table.select(chosen)
