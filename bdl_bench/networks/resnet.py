"""ResNet-18 (He et al. 2016), 11.2 million parameters with ten classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["resnet18", "small_image_stem"]


class _Block(nn.Module):
    """Two convolutions with a skip connection, which is a 1×1 convolution if shapes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
            *(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.skip = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H/stride, W/stride)."""
        return torch.relu(self.body(x) + self.skip(x))


def resnet18(n_classes: int = 10, stem: nn.Sequential | None = None) -> nn.Sequential:
    """Return ResNet-18 for images (B, 3, H, W); `stem` maps these to (B, 64, H', W'), by default as published."""
    widths = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
    stem = _stem() if stem is None else stem
    blocks = [block for i, o, stride in widths for block in (_Block(i, o, stride), _Block(o, o, 1))]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, n_classes))


def small_image_stem() -> nn.Sequential:
    """Return the usual stem for images of 32 × 32 pixels: one 3 × 3 convolution, no pooling."""
    return nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())


def _stem() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    )
