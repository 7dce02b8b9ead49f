"""Find and insert dropout layers, and fix their masks to be the same for every row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from estimators.errors import UnsupportedError
from estimators.models.structural_copy import structural_copy

__all__ = ["FixedDropout", "dropout_names", "with_dropout", "with_fixed_dropout"]


def dropout_names(model: nn.Module) -> list[str]:
    """Return the names of the dropout layers: nn.Dropout and its variants with p > 0."""
    dropping = set(map(id, _dropout_layers(model)))
    return [name for name, layer in model.named_modules() if id(layer) in dropping]


def _dropout_layers(model: nn.Module) -> list[_DropoutNd]:
    return [layer for layer in model.modules() if isinstance(layer, _DropoutNd) and layer.p > 0]


class FixedDropout(nn.Module):
    """A dropout layer in train mode with a mask that is drawn for one row and used for all rows.

    With a fixed mask, each dropout layer of torch is affine entry by entry. Its coefficients are its values at ones and
    at zeros. If the module is called several times in a forward pass, each call has its own mask. Call
    `draw(seed, rows)` before the forward pass of `rows` rows.
    """

    def __init__(self, layer: _DropoutNd) -> None:
        super().__init__()
        self.layer = layer
        self._seed, self._rows, self._calls = 0, 0, 0

    def draw(self, seed: int, rows: int) -> None:
        """Use the masks of this seed in the next forward pass."""
        self._seed, self._rows, self._calls = seed, rows, 0

    def forward(self, x: Tensor) -> Tensor:
        if not self._rows or len(x) % self._rows:
            raise UnsupportedError(
                "dropout layers whose inputs have the rows first, so that all rows can share a mask",
                received=f"an input of shape {tuple(x.shape)} with {self._rows} rows",
                remedy="use batch_first=True, or DeepEnsemble, or SWAG.",
            )
        scale, shift = self._mask(x[:1])
        return x * scale + shift

    def _mask(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale (1, ...) and shift (1, ...) for a row of this shape, drawn on the CPU for any device."""
        seed = self._seed + self._calls
        self._calls += 1
        ones = torch.ones(row.shape, dtype=row.dtype)
        at_one, at_zero = (self._apply_layer(value, seed).to(row.device) for value in (ones, torch.zeros_like(ones)))
        return at_one - at_zero, at_zero

    def _apply_layer(self, value: Tensor, seed: int) -> Tensor:
        self.layer.train()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            result: Tensor = self.layer(value)
        return result


def with_fixed_dropout(model: nn.Module) -> nn.Module:
    """Return a structural copy with every dropout layer in a FixedDropout; parameters and their names stay."""
    module = structural_copy(model)
    _replace(module, {id(layer): FixedDropout(layer) for layer in _dropout_layers(module)})
    return module


class DroppedLinear(nn.Linear):
    """A linear layer after a dropout layer; the names of its weights are those of nn.Linear."""

    dropout: nn.Module

    @classmethod
    def around(cls, layer: nn.Linear, rate: float) -> Self:
        """Return dropout and then `layer`, with the same parameters."""
        dropped = cls(layer.in_features, layer.out_features, bias=False, device="meta")
        dropped.weight, dropped.bias, dropped.dropout = layer.weight, layer.bias, nn.Dropout(rate)
        return dropped.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.dropout(input), self.weight, self.bias)


def with_dropout(model: nn.Module, rate: float) -> nn.Module:
    """Insert dropout before each nn.Linear but the first layer with weights; return the model itself.

    Raises UnsupportedError if there is no such layer.
    """
    layers = [layer for layer in _weighted_layers(model)[1:] if type(layer) is nn.Linear]
    if not layers:
        raise UnsupportedError(
            "a network with an nn.Linear after another layer, to insert dropout before",
            received=f"{type(model).__name__} without one",
            remedy="put nn.Dropout layers into the model.",
        )
    _replace(model, {id(layer): DroppedLinear.around(layer, rate) for layer in layers})
    return model


def _weighted_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers with weights in the order of their registration."""
    kinds = (nn.Linear, _ConvNd, nn.Embedding, nn.RNNBase, nn.MultiheadAttention)
    return [layer for layer in model.modules() if isinstance(layer, kinds)]


def _replace(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Replace the modules with these ids wherever they are registered."""
    locations = [
        (parent, name) for parent in model.modules() for name, m in parent._modules.items() if id(m) in replacements
    ]
    for parent, name in locations:
        parent._modules[name] = replacements[id(parent._modules[name])]
