"""Distribution shifts at five severities: noise, blur, contrast and the like on grey images, noise on table features.

The noise and the direction of rotation of each row are drawn once per seed, so severities differ in size only.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

__all__ = ["SEVERITIES", "feature_shifts", "image_shifts"]

SEVERITIES = (1, 2, 3, 4, 5)

_Images = NDArray[np.float64]

_NOISE = 0.1
"""Standard deviation per severity, as a share of the range of a pixel."""
_ROTATION = 6.0
"""Degrees per severity."""
_CONTRAST = (0.8, 0.6, 0.45, 0.3, 0.15)
"""Factors of the distance from the mean of the image."""
_FEATURE_NOISE = 0.25
"""Standard deviations per severity."""


def image_shifts(images: Tensor, seed: int) -> dict[str, Tensor]:
    """Return images (N, H, W) in [0, 1] under noise, rotation and loss of contrast, by "<family>-<severity>"."""
    pixels, rng = images.numpy(), np.random.default_rng(seed)
    mean = pixels.mean((1, 2), keepdims=True)
    noise, clockwise = rng.standard_normal(pixels.shape), rng.random(len(pixels)) < 0.5
    families: dict[str, Callable[[int], _Images]] = {
        "noise": lambda severity: np.clip(pixels + _NOISE * severity * noise, 0, 1),
        "rotation": lambda severity: _rotated(pixels, _ROTATION * severity, clockwise),
        "contrast": lambda severity: mean + _CONTRAST[severity - 1] * (pixels - mean),
    }
    return {
        f"{family}-{severity}": torch.from_numpy(shifted(severity)).to(images.dtype)
        for family, shifted in families.items()
        for severity in SEVERITIES
    }


def feature_shifts(x: Tensor, seed: int) -> dict[str, Tensor]:
    """Return standardised features (N, D) with Gaussian noise of 0.25 to 1.25, by "noise-<severity>"."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    return {f"noise-{severity}": x + _FEATURE_NOISE * severity * noise for severity in SEVERITIES}


def _rotated(pixels: _Images, degrees: float, clockwise: NDArray[np.bool_]) -> _Images:
    # "grid-constant" since "constant" blackens the outermost pixels at the smallest turn
    left, right = (
        ndimage.rotate(pixels, sign * degrees, axes=(2, 1), reshape=False, order=1, mode="grid-constant")
        for sign in (1, -1)
    )
    rotated: _Images = np.where(clockwise[:, None, None], right, left)
    return rotated
