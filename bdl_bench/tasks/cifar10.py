"""CIFAR-10, with SVHN out of distribution and CIFAR-10-C as shifts.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009; no licence stated); Netzer et al.,
"Reading Digits in Natural Images" (SVHN, 2011; for non-commercial use); Hendrycks and Dietterich, "Benchmarking Neural
Network Robustness to Common Corruptions and Perturbations" (CIFAR-10-C, 2019; CC BY 4.0). Downloaded at the first use:
163 MB, 61 MB and 2.9 GB. Size: 50,000 + 10,000 images of 32 × 32 pixels in colour, ten classes.
Split: 45,000 train and 5,000 validation images, drawn by the seed from the authors' training images; 10,000 test images
are theirs. Channels are standardised with the mean and standard deviation of the training images.
Out of distribution: the first 10,000 test images of SVHN, without targets. Shifts: the first 1,000 test images under
each of the fifteen corruptions of the benchmark at each of five severities.
Model: ResNet-18 with the 3 × 3 stem for small images, BatchNorm, float32, 11,173,962 parameters. Prior precision
δ = 22.5, which is a weight decay of 5e-4 at this size; fixed, not tuned.
Recipe: SGD with Nesterov momentum 0.9, 50 epochs, batches of 128, learning rate 0.1, cosine. No augmentation: the
posterior is of these rows, and a method that fits them again would see others each time.
"""

from __future__ import annotations

from torch import nn

from bdl_bench.data.cifar import cifar10
from bdl_bench.data.corrupted_cifar import corrupted_cifar10
from bdl_bench.data.pixels import Scale, batches_of, shuffled_batches_of
from bdl_bench.data.svhn import svhn_test
from bdl_bench.networks.resnet import resnet18, small_image_stem
from bdl_bench.problem.problem import Problem
from bdl_bench.tasks.registry import register
from bdl_bench.tasks.split import split_validation
from estimators.training.training import Recipe

__all__ = ["make_problem"]

_NEEDS = "downloads of 163 MB (CIFAR-10), 61 MB (SVHN) and 2.9 GB (CIFAR-10-C)"
_VALIDATION, _OOD_ROWS, _SHIFTED_ROWS, _ROWS_A_STEP = 0.1, 10_000, 1_000, 128


@register("cifar10", needs=_NEEDS)
def make_problem(seed: int) -> Problem:
    """Classification: CIFAR-10, with SVHN out of distribution and CIFAR-10-C, ResNet-18, 45,000 training images."""
    images = cifar10("train")
    train, validation = split_validation(len(images), _VALIDATION, seed)
    scale = Scale.of(images.at(train))
    return Problem(
        _network(),
        "classification",
        shuffled_batches_of(images.at(train), scale, batch_size=_ROWS_A_STEP, seed=seed),
        batches_of(images.at(validation), scale),
        batches_of(cifar10("test"), scale),
        prior_precision=22.5,
        recipe=Recipe(epochs=50, batch_size=None, optimizer="nesterov", lr=0.1, schedule="cosine"),
        make_model=_network,
        ood={"SVHN": batches_of(svhn_test().at(slice(_OOD_ROWS)).unlabelled(), scale)},
        shifts={name: batches_of(shifted, scale) for name, shifted in corrupted_cifar10(_SHIFTED_ROWS).items()},
    )


def _network() -> nn.Module:
    return resnet18(10, small_image_stem())
