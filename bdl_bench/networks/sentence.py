"""A sentence classifier on the last layer of a pretrained encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["SentenceClassifier", "mean_of_tokens"]


class SentenceClassifier(nn.Module):
    """A layer of an encoder, the mean of its outputs over tokens that are not padding, and a linear layer.

    `layer` maps hidden states (B, T, D) and an additive attention mask (B, 1, 1, T) to (B, T, D).
    """

    def __init__(self, layer: nn.Module, width: int, n_classes: int) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(width, n_classes)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits (B, C) of hidden states (B, T, D) and a mask (B, T), 0 for padding."""
        kept = attention_mask.to(hidden_states.dtype)
        blocked = (1 - kept)[:, None, None, :] * torch.finfo(hidden_states.dtype).min
        logits: Tensor = self.head(mean_of_tokens(self.layer(hidden_states, blocked), attention_mask))
        return logits


def mean_of_tokens(hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the mean (B, D) of hidden states (B, T, D) over the tokens that are not padding; the mask is (B, T)."""
    weights = attention_mask.to(hidden_states.dtype).unsqueeze(-1)
    return (hidden_states * weights).sum(1) / weights.sum(1)
