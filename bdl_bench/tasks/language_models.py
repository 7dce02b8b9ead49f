"""GPT-Neo 125M and 1.3B with adapters, on Wikitext-103 and on IMDB: the paper's networks and data (McInerney & Kallus).

Source: Merity et al., "Pointer Sentinel Mixture Models" (2017; CC BY-SA 3.0), Salesforce/wikitext on the hub, 313 MB;
IMDB as in the task imdb, here as text alone; GPT-Neo (Black et al. 2021; MIT), 0.5 and 5.3 GB.
Size: the first 128 tokens of paragraphs and reviews of at least 32 words. 4,096 rows to train on, shorter ones
padded and masked; 100 to validate and 200 to test, of texts of at least 128 words. They are drawn by the seed, from
the data's own splits; the validation rows of IMDB are from a tenth of its training reviews, which are not trained on.
Trained on is every token that follows another. Scored is the last token of validation and test rows, which have no
padding: a record with 50,257 probabilities for every token would be large.
Out of distribution: the test rows with the tokens before the scored one in a random order.
Model: GPT-Neo with LoRA adapters of rank 8 on queries and values, 294,912 and 1,572,864 parameters, float32. Prior
precision δ = 100, chosen by hand and equal in all methods.
Recipe: Adam, 1 epoch, batches of 8, learning rate 2e-4, cosine.

The authors' experiments train all weights, and compare logits with labels that are not shifted and padding that is not
masked; see the reproduction notes. Here the likelihood shifts the labels, padding has none, and all fits are on
training rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from bdl_bench.data.pretrained import pretrained, with_adapters
from bdl_bench.data.texts import Texts
from bdl_bench.data.token_rows import TokenRows, drawn_rows
from bdl_bench.problem.problem import Problem
from bdl_bench.tasks.imdb import REVIEWS
from bdl_bench.tasks.registry import register
from estimators.training.training import Recipe

__all__ = ["TASKS_OF_GPT_NEO", "LanguageModelTask"]

WIKITEXT = Texts("wikitext-103", "Salesforce/wikitext", "wikitext-103-raw-v1")
SMALL, LARGE = "EleutherAI/gpt-neo-125m", "EleutherAI/gpt-neo-1.3B"
_TRAIN, _VALIDATION, _TEST = 4096, 100, 200
_TOKENS, _SCORED, _LEAST_WORDS = 128, 1, 32
_ROWS_A_STEP = 8


@dataclass(frozen=True)
class LanguageModelTask:
    """A pretrained causal network, by its name, and the texts that it is adapted to."""

    network: str
    texts: Texts

    def problem(self, seed: int) -> Problem:
        """Return the problem of one seed."""
        train, validation = self._train_and_validation(seed)
        test = self._full(self.texts.split("test"), _TEST, seed)
        return Problem(
            self._network(),
            "causal_lm",
            self._rows(drawn_rows(train, _TRAIN, seed, least_words=_LEAST_WORDS)).training(batch_size=_ROWS_A_STEP),
            self._full(validation, _VALIDATION, seed).scored(_SCORED, batch_size=_ROWS_A_STEP),
            test.scored(_SCORED, batch_size=_ROWS_A_STEP),
            prior_precision=100.0,
            recipe=Recipe(epochs=1, batch_size=_ROWS_A_STEP, optimizer="adam", lr=2e-4, schedule="cosine"),
            make_model=self._network,
            ood={"shuffled": _shuffled(test, seed).scored(_SCORED, batch_size=_ROWS_A_STEP)},
        )

    def _train_and_validation(self, seed: int) -> tuple[Any, Any]:
        train = self.texts.split("train")
        if self.texts is not REVIEWS:
            return train, self.texts.split("validation")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
        return train.select(order[len(train) // 10 :]), train.select(order[: len(train) // 10])

    def _full(self, table: Any, n: int, seed: int) -> TokenRows:  # noqa: ANN401
        """Return rows without padding, since a word has at least one token."""
        return self._rows(drawn_rows(table, n, seed, least_words=_TOKENS))

    def _rows(self, table: Any) -> TokenRows:  # noqa: ANN401
        return TokenRows.of(list(table["text"]), pretrained("AutoTokenizer", self.network), _TOKENS)

    def _network(self) -> nn.Module:
        network = pretrained("AutoModelForCausalLM", self.network, attn_implementation="eager")
        return with_adapters(network, ["q_proj", "v_proj"], rank=8)


def _shuffled(rows: TokenRows, seed: int) -> TokenRows:
    """Return rows with the tokens before the scored ones in a random order, different in each row."""
    n_context = rows.ids.shape[1] - _SCORED
    keys = torch.rand(len(rows), n_context, generator=torch.Generator().manual_seed(seed))
    context = rows.ids[:, :n_context].gather(1, keys.argsort(1))
    return replace(rows, ids=torch.cat([context, rows.ids[:, n_context:]], dim=1))


TASKS_OF_GPT_NEO = {
    "wikitext-103": (LanguageModelTask(SMALL, WIKITEXT), "paragraphs of Wikitext-103, GPT-Neo 125M"),
    "wikitext-103-1.3b": (LanguageModelTask(LARGE, WIKITEXT), "paragraphs of Wikitext-103, GPT-Neo 1.3B"),
    "imdb-lm": (LanguageModelTask(SMALL, REVIEWS), "film reviews (IMDB), GPT-Neo 125M"),
    "imdb-lm-1.3b": (LanguageModelTask(LARGE, REVIEWS), "film reviews (IMDB), GPT-Neo 1.3B"),
}
_SIZES = {SMALL: "0.5 GB (GPT-Neo 125M)", LARGE: "5.3 GB (GPT-Neo 1.3B)", WIKITEXT: "313 MB (Wikitext)",
          REVIEWS: "84 MB (IMDB)"}  # fmt: skip

for _name, (_task, _texts) in TASKS_OF_GPT_NEO.items():
    _needs = f'the extras "text" and "hub", and downloads of {_SIZES[_task.texts]} and {_SIZES[_task.network]}'
    _summary = f"Causal language model: {_texts} with LoRA adapters, 4,096 training rows"
    register(_name, needs=_needs, summary=_summary)(_task.problem)
