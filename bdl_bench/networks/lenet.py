"""LeNet-5 in its modern form (LeCun et al. 1998; ReLU and maximum pooling), 61,706 parameters."""

from __future__ import annotations

from torch import nn

__all__ = ["lenet"]


def lenet(n_classes: int = 10) -> nn.Sequential:
    """Return LeNet-5 for images (B, 1, 28, 28), which are padded to the 32 × 32 of the paper."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, n_classes)),
    )
