"""Four small smooth networks, at most 300 parameters each, of the kinds that practice uses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["INPUT_SHAPES", "NETWORKS"]


def mlp(n_outputs: int) -> nn.Module:
    """Two layers, tanh: plain Sequential, for BackPACK."""
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, n_outputs))


def cnn(n_outputs: int) -> nn.Module:
    """Two convolutions with GroupNorm between them; a large ε keeps weights before the norm off a flat direction."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.GroupNorm(2, 4, eps=0.5),
        nn.GELU(),
        nn.Conv2d(4, 4, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, n_outputs),
    )


class ResidualNetwork(nn.Module):
    """A residual block with BatchNorm, used in eval mode with running statistics that are not the identity."""

    def __init__(self, n_outputs: int) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.block, self.block_norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.head = nn.Linear(6, n_outputs)
        for norm in (self.stem_norm, self.block_norm):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.copy_(torch.linspace(-0.4, 0.3, 6))
            norm.running_var.copy_(torch.linspace(0.5, 1.6, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem_norm(self.stem(x)))
        f: Tensor = self.head(h + F.softplus(self.block_norm(self.block(h))))
        return f


class AttentionNetwork(nn.Module):
    """One pre-norm attention block over three tokens, by the fused kernel's public function, then a mean and a head."""

    def __init__(self, n_outputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.query, self.key, self.value, self.out = (nn.Linear(4, 4) for _ in range(4))
        self.head = nn.Linear(4, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (self._heads(layer(h)) for layer in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        f: Tensor = self.head(torch.tanh(x + self.out(mixed)).mean(1))
        return f

    @staticmethod
    def _heads(tokens: Tensor) -> Tensor:
        heads: Tensor = tokens.unflatten(-1, (2, 2)).transpose(1, 2)
        return heads


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "residual": ResidualNetwork,
    "attention": AttentionNetwork,
}
INPUT_SHAPES = {"mlp": (3,), "cnn": (1, 5, 5), "residual": (4,), "attention": (3, 4)}
