"""How a network with a last layer at every position of a row, such as every token, arrives at one output per row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from estimators.errors import OptionError
from estimators.numerics.pytrees import PyTree, plain_inputs
from estimators.option_checks import shown

__all__ = ["FeatureReduction", "Reduce", "checked_reduction", "reduction_of"]

FeatureReduction = str | Callable[[Tensor, Any], Tensor]
"""A name, or a function of what the layer has at the positions of all rows (B, T, D) and the inputs, to (B, D)."""
Reduce = Callable[[Tensor, PyTree], Tensor]
"""(B, T, D) and the inputs of B rows -> (B, D), linear in the first."""

_NAMES = ("pick_first", "pick_last", "average")


def checked_reduction(value: FeatureReduction | None) -> FeatureReduction | None:
    """Return a feature reduction, or raise OptionError."""
    if value is None or callable(value) or (isinstance(value, str) and value in _NAMES):
        return value
    raise OptionError(
        f"feature_reduction among {', '.join(map(repr, _NAMES))}, None, or a function (features, inputs) -> features",
        received=shown(value),
        remedy='"pick_last" for sequence classifiers with causal attention, such as GPT-2 and Llama.',
    )


def reduction_of(value: FeatureReduction | None, module: nn.Module) -> Reduce | None:
    """Return the function of a feature reduction for a module, whose config may name the token of padding.

    "pick_last" takes the last token that is not padding: by `pad_token_id` of the config as the models of transformers
    do, else by the "attention_mask" of the inputs, else the last position. "average" is the mean over the positions
    of the "attention_mask", or over all positions.
    """
    if value is None:
        return None
    if callable(value):
        function = value
        return lambda features, x: function(features, plain_inputs(x))
    if value == "pick_first":
        return lambda features, x: features[:, 0]  # noqa: ARG005
    if value == "average":
        return _average
    config = getattr(module, "config", None)
    padding = getattr(config, "pad_token_id", None)
    return lambda features, x: _last(features, x, padding)


def _last(features: Tensor, x: PyTree, padding: int | None) -> Tensor:
    """Return the features of the last token of each row that is not padding."""
    x = plain_inputs(x)
    named = x if isinstance(x, Mapping) else {}
    tokens = named.get("input_ids", x)
    kept: Tensor | None = named.get("attention_mask")
    if padding is not None and isinstance(tokens, Tensor) and tokens.shape == features.shape[:2]:
        kept = tokens != padding
    if kept is None:
        return features[:, -1]
    positions = torch.arange(features.shape[1], device=features.device, dtype=torch.int32)
    last = (positions * kept.to(features.device, torch.int32)).argmax(-1)
    return features.gather(1, last[:, None, None].expand(-1, 1, features.shape[2]))[:, 0]


def _average(features: Tensor, x: PyTree) -> Tensor:
    """Return the mean of the features over the positions that are not masked."""
    x = plain_inputs(x)
    mask = x.get("attention_mask") if isinstance(x, Mapping) else None
    if mask is None:
        return features.mean(1)
    weights = mask.to(features)
    mean: Tensor = (features * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
    return mean
