"""Networks of up to a million parameters."""

from __future__ import annotations

from torch import nn

__all__ = ["convolutional", "group_norm", "mlp"]


def mlp(inputs: int, hidden: int, outputs: int, *, bias: bool = True) -> nn.Sequential:
    """Return a network with one hidden layer of tanh units, in eval mode."""
    return nn.Sequential(nn.Linear(inputs, hidden, bias), nn.Tanh(), nn.Linear(hidden, outputs, bias)).eval()


def convolutional(hidden: int = 227, *, bias: bool = True) -> nn.Sequential:
    """Return two convolutions and two linear layers for images (B, 3, 32, 32): 951,691 parameters at `hidden=227`."""
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1, bias=bias), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1, bias=bias), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(4096, hidden, bias), nn.ReLU(), nn.Linear(hidden, 10, bias)),
    ).eval()


def group_norm(n_classes: int = 10) -> nn.Sequential:
    """Return two convolutions with group normalisation (Wu & He 2018) for images (B, 1, 8, 8): 1,946 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, 2, padding=1), nn.GroupNorm(2, 8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, 2, padding=1), nn.GroupNorm(4, 16), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64, n_classes)),
    )
