"""Networks that only benchmarks use, on images of 32 × 32 pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["VisionTransformer", "convolutional"]


class VisionTransformer(nn.Module):
    """ViT-tiny (Touvron et al. 2021): 12 pre-norm layers of width 192 with 3 heads, 5.4 million parameters."""

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


def convolutional(hidden: int = 227, *, bias: bool = True) -> nn.Sequential:
    """Return two convolutions and two linear layers for images (B, 3, 32, 32): 951,691 parameters at `hidden=227`."""
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1, bias=bias), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1, bias=bias), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(4096, hidden, bias), nn.ReLU(), nn.Linear(hidden, 10, bias)),
    ).eval()
