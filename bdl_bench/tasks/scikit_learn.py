"""Tasks on the data sets that are bundled with scikit-learn. Nothing is downloaded; all are in float64.

Sources:
- diabetes: Efron, Hastie, Johnstone and Tibshirani, "Least Angle Regression" (2004; BSD). 442 patients, 10
  measurements, disease progression after a year. σ = 0.7 is about the residual spread of a linear fit.
- wine: Aeberhard and Forina, "Wine" (UCI, 1992; CC BY 4.0). 178 wines, 13 chemical measurements, three cultivars.
- breast-cancer: Wolberg, Mangasarian, Street and Street, "Breast Cancer Wisconsin (Diagnostic)" (UCI, 1995; CC BY 4.0).
  569 patients, 30 measurements of nuclei, the target 1 for benign.
- digits: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits" (UCI, 1998; CC BY 4.0), its test part. 1797
  images of 8 × 8 pixels (0 to 16, divided by 16), ten classes.

Split: the rows in `sizes` train and validate, the rest tests, drawn by the seed. The inputs of tables, and targets of
regression, are standardised with the mean and standard deviation of the training rows.
Split of diabetes-gap (Foong et al. 2019): rows are sorted by one of the nine measurements that are not two-valued, the
one of number seed mod 9. The middle third, 148 rows, is out of distribution, with targets. Of the other 294 rows, 206
train, 44 validate and 44 test.
Out of distribution of digits-ood: all 354 images of 8 and 9, without targets, since the network has no such class.
Shifts of wine and breast-cancer: the test rows with Gaussian noise of 0.25 to 1.25 standard deviations on every
feature. Shifts of digits and digits-cnn: the first 200 test images under noise, rotation and loss of contrast. All
have five severities.
Models: one hidden layer, tanh; diabetes 601, wine 275, breast-cancer 513, digits 2410, digits-ood 2344 parameters.
digits-cnn has two strided convolutions of 8 and 16 channels with GroupNorm and a linear layer, 1946 parameters.
Prior precision δ = 1, fixed, not tuned. Recipe: Adam, learning rate 0.01, cosine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from torch import Tensor, nn

from bdl_bench.data.shifts import feature_shifts, image_shifts
from bdl_bench.networks.small import group_norm, mlp
from bdl_bench.problem.problem import Problem
from bdl_bench.tasks.registry import register
from bdl_bench.tasks.split import gap_split, loader, split_indices, standardised
from estimators.likelihoods import Gaussian, Likelihood
from estimators.training.training import Recipe

__all__ = ["BUNDLED", "BundledTask"]

_HELD_OUT = 8
"""First of the digits that digits-ood holds out."""
_SHIFTED_IMAGES = 200
_GAP_FEATURES = (0, 2, 3, 4, 5, 6, 7, 8, 9)
_GAP_SHARES = {"train": 0.7, "validation": 0.15}


@dataclass(frozen=True)
class BundledTask:
    """A task on a bundled data set.

    Args:
        load: scikit-learn's loader, called with return_X_y=True.
        likelihood: of the targets.
        sizes: numbers of training and validation rows; the rest are test rows. Not used if `gap`: see `_GAP_SHARES`.
        network: builds the untrained network.
        epochs: of training.
        batch_size: of training.
        shape: of an image as the network takes it; None for tables.
        shifted: whether the test rows are shifted, too.
        gap: whether the rows of a gap in one feature are out of distribution.
        held_out: whether the classes from `_HELD_OUT` on are out of distribution.
    """

    load: Callable[..., Any]
    likelihood: str | Likelihood
    sizes: tuple[int, int]
    network: Callable[[], nn.Module]
    epochs: int
    batch_size: int
    shape: tuple[int, ...] | None = None
    shifted: bool = False
    gap: bool = False
    held_out: bool = False

    def problem(self, seed: int) -> Problem:
        """Return the problem with the split of one seed."""
        x, y = (torch.from_numpy(array) for array in self.load(return_X_y=True))
        x, y = x.double(), y.long() if self.likelihood == "classification" else y.double().unsqueeze(-1)
        if self.shape is not None:
            x = x.reshape(-1, *self.shape) / 16
        ood: dict[str, Any] = {}
        if self.held_out:
            ood = {"held-out": list(x[y >= _HELD_OUT].split(100))}
            x, y = x[y < _HELD_OUT], y[y < _HELD_OUT]
        if self.gap:
            split = gap_split(x[:, _GAP_FEATURES[seed % len(_GAP_FEATURES)]], **_GAP_SHARES, seed=seed)
            parts = split.parts
        else:
            parts = split_indices(len(x), train=self.sizes[0], validation=self.sizes[1], seed=seed)
        if self.shape is None:
            x = standardised(x, parts[0])
        if isinstance(self.likelihood, Gaussian):
            y = standardised(y, parts[0])
        if self.gap:
            ood = {"gap": loader(x[split.gap], y[split.gap])}
        return Problem(
            self.network(),
            self.likelihood,
            *(loader(x[i], y[i]) for i in parts),
            prior_precision=1.0,
            recipe=Recipe(epochs=self.epochs, batch_size=self.batch_size, optimizer="adam", lr=1e-2, schedule="cosine"),
            make_model=self.network,
            ood=ood,
            shifts=self._shifts(x[parts[2]], y[parts[2]], seed) if self.shifted else None,
        )

    def _shifts(self, x: Tensor, y: Tensor, seed: int) -> dict[str, Any]:
        if self.shape is None:
            return {name: loader(noisy, y) for name, noisy in feature_shifts(x, seed).items()}
        x, y = x[:_SHIFTED_IMAGES], y[:_SHIFTED_IMAGES]
        shifts = image_shifts(x.reshape(-1, 8, 8), seed)
        return {name: loader(images.reshape(x.shape), y) for name, images in shifts.items()}


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Module:
    return mlp(inputs, hidden, outputs).double().train()


def _cnn() -> nn.Module:
    return group_norm().double()


_RAW_DIABETES = partial(load_diabetes, scaled=False)
_DIABETES = (_RAW_DIABETES, Gaussian(sigma_noise=0.7), (300, 42), partial(_mlp, 10, 50, 1), 150, 50)

BUNDLED = {
    "diabetes": (
        BundledTask(*_DIABETES),
        "Regression: progression of diabetes from 10 measurements, MLP 10-50-1, 300 training rows.",
    ),
    "diabetes-gap": (
        BundledTask(*_DIABETES, gap=True),
        "Regression: diabetes without the middle third of one measurement, MLP 10-50-1, 206 training rows.",
    ),
    "wine": (
        BundledTask(load_wine, "classification", (90, 40), partial(_mlp, 13, 16, 3), 150, 30, shifted=True),
        "Classification: three cultivars from 13 measurements, and with noise on them, MLP 13-16-3, 90 training rows.",
    ),
    "breast-cancer": (
        BundledTask(load_breast_cancer, "binary", (300, 119), partial(_mlp, 30, 16, 1), 80, 50, shifted=True),
        "Binary: malignant or benign from 30 measurements, and with noise on them, MLP 30-16-1, 300 training rows.",
    ),
    "digits": (
        BundledTask(
            load_digits, "classification", (1000, 297), partial(_mlp, 64, 32, 10), 100, 64, (64,), shifted=True
        ),
        "Classification: handwritten digits of 8 x 8 pixels, and shifted, MLP 64-32-10, 1000 training images.",
    ),
    "digits-cnn": (
        BundledTask(
            load_digits, "classification", (1000, 297), _cnn, epochs=30, batch_size=64, shape=(1, 8, 8), shifted=True
        ),
        "Classification: the images of digits, and shifted, GroupNorm CNN of 1946 parameters, 1000 training images.",
    ),
    "digits-ood": (
        BundledTask(
            load_digits, "classification", (850, 250), partial(_mlp, 64, 32, _HELD_OUT), 100, 64, (64,), held_out=True
        ),
        "Classification: the digits 0 to 7, with 8 and 9 out of distribution, MLP 64-32-8, 850 training images.",
    ),
}

for _name, (_task, _summary) in BUNDLED.items():
    register(_name, default=_name in ("diabetes", "digits"), summary=_summary)(_task.problem)
