"""ViT-tiny (Touvron et al. 2021) on small images: 12 layers of width 192 with 3 heads, 5.4 million parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["VisionTransformer"]


class VisionTransformer(nn.Module):
    """Patch embedding with a class token, pre-norm encoder layers, and a linear layer on the class token."""

    def __init__(self, n_classes: int = 10, size: int = 32, patch: int = 8, width: int = 192, depth: int = 12) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (size // patch) ** 2, width))
        layer = nn.TransformerEncoderLayer(
            width, 3, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, n_classes) of images (B, 3, size, size)."""
        patches = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], dim=1) + self.positions
        logits: Tensor = self.head(self.encoder(tokens)[:, 0])
        return logits
