"""Causal language models."""

from __future__ import annotations

import torch
from torch import Tensor

from estimators.errors import UnsupportedError
from estimators.likelihoods.base import Likelihood
from estimators.likelihoods.categorical import Categorical

__all__ = ["CausalTokens"]


class CausalTokens(Categorical):
    """The next token of a causal language model: logits (B, T, V), labels (B, T) as Hugging Face has them.

    Labels are the input tokens, not shifted: the logits at t predict the label at t + 1, and those at the last token
    predict nothing. N counts rows (texts), sums go over tokens.

    Args:
        ignore_index: label of tokens without a target: padding and prompts.
    """

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__(ignore_index=ignore_index)

    def given(self, y: Tensor) -> Likelihood:
        nothing = torch.full_like(y[:, :1], self.ignore_index)
        return super().given(torch.cat([y[:, 1:], nothing], dim=1))

    def check_targets(self, f: Tensor, y: Tensor) -> None:
        if f.ndim != 3:
            raise UnsupportedError(
                "logits of shape (B, T, V), a next token at every position",
                received=f"shape {tuple(f.shape)}",
                remedy='likelihood="classification" for one class per row.',
            )
        super().check_targets(f, y)
