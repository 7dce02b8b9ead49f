"""Networks that use every weight once a row, and one that does not."""

import torch
from torch import nn


class Transposed(nn.Module):
    """A weight stored as (inputs, outputs), a residual, and a raw parameter in between."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
        self.shift, self.head = nn.Parameter(torch.randn(4)), nn.Linear(4, 3, bias=False)

    def forward(self, x):
        return self.head(torch.tanh(torch.addmm(self.bias, x, self.weight)) * self.shift + x)


NETWORKS = {
    "plain": lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ELU(), nn.Linear(5, 3)),
    "without biases": lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False)),
    "norm": lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)),
    "frozen": lambda: nn.Sequential(nn.Linear(4, 6).requires_grad_(requires_grad=False), nn.Tanh(), nn.Linear(6, 3)),
    "transposed": Transposed,
}


def wide(outputs):
    return nn.Sequential(nn.Linear(4, 80), nn.Tanh(), nn.Linear(80, outputs))


class Twice(nn.Module):
    """One layer at two places a row."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.head = nn.Linear(4, 25), nn.Linear(25, 25), nn.Linear(25, 3)

    def forward(self, x):
        return self.head(self.twice(torch.tanh(self.twice(self.first(x)))))
