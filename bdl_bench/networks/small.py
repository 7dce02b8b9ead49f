"""Networks of up to a million parameters."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

__all__ = ["group_norm", "lenet", "mlp", "relu_mlp"]


def mlp(inputs: int, hidden: int, outputs: int, *, bias: bool = True) -> nn.Sequential:
    """Return a network with one hidden layer of tanh units, in eval mode."""
    return nn.Sequential(nn.Linear(inputs, hidden, bias), nn.Tanh(), nn.Linear(hidden, outputs, bias)).eval()


def relu_mlp(*widths: int) -> nn.Sequential:
    """Return a network with hidden layers of ReLU units, in float64; `widths` are those of inputs, layers, outputs."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def group_norm(n_classes: int = 10) -> nn.Sequential:
    """Return two convolutions with group normalisation (Wu & He 2018) for images (B, 1, 8, 8): 1,946 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, 2, padding=1), nn.GroupNorm(2, 8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, 2, padding=1), nn.GroupNorm(4, 16), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64, n_classes)),
    )


def lenet(n_classes: int = 10) -> nn.Sequential:
    """Return LeNet-5 with ReLU and maximum pooling (LeCun et al. 1998) for images (B, 1, 28, 28): 61,706 parameters."""
    return nn.Sequential(  # the images are padded to the 32 × 32 of the paper
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, n_classes)),
    )
