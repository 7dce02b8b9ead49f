"""The error of a derivative relative to the one by plain autograd.

g = Jᵀu is the gradient (P,) of ⟨u, f⟩ by plain autograd, for weights u of the outputs f; r is a direction of the
parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["WHOLE_NORM_SHARE", "Disagreement", "error_along_direction", "largest_parameter_error", "relative_error"]

WHOLE_NORM_SHARE = 1e-2
"""Share of the norm of the whole gradient that is added to the norm of one parameter's gradient in a relative error.

Without it, round-off in a parameter with a gradient near 0 would count as a disagreement."""


_BLOCK = 2**20
"""Numbers that are converted to float64 at a time."""


@dataclass(frozen=True)
class Disagreement:
    """How far a derivative is from the one by plain autograd.

    Attributes:
        error: the relative error, without a unit; NaN if the derivative is not finite.
        name: the parameter with the largest error; None if the error is not of one parameter.
        allowance: the round-off of this kind of derivative, in units of that of first derivatives.
    """

    error: float
    name: str | None
    allowance: float = 1.0

    def within(self, tolerance: float) -> bool:
        """Return whether the error is round-off.

        Args:
            tolerance: the largest relative error of a first derivative that counts as round-off.

        Returns:
            True if the error is at most `allowance` times `tolerance`; False for NaN.
        """
        return self.error <= self.allowance * tolerance

    def __str__(self) -> str:
        parameter = "" if self.name is None else f", most in {self.name!r}"
        return f"differs from plain autograd by {100 * self.error:.2g} %{parameter}"


def largest_parameter_error(entries: dict[str, int], product: Tensor, gradient: Tensor) -> Disagreement:
    """The parameter in which `product` (P,) differs most from g (P,); `entries` has the number of entries by name."""
    sizes = list(entries.values())
    parts = zip(product.split(sizes), gradient.split(sizes), strict=True)
    norms = [_norms_in_blocks(got, expected) for got, expected in parts]
    whole = math.hypot(*(scale for _, scale in norms))
    errors = [
        (relative_error(error, scale + WHOLE_NORM_SHARE * whole), name)
        for name, (error, scale) in zip(entries, norms, strict=True)
    ]
    error, name = max(errors, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])
    return Disagreement(error, name)


def _norms_in_blocks(product: Tensor, gradient: Tensor) -> tuple[float, float]:
    """The norms of product − gradient and of the gradient, in float64 without a copy of all numbers in float64."""
    total = torch.zeros(2, dtype=torch.float64)
    for got, expected in zip(product.split(_BLOCK), gradient.split(_BLOCK), strict=True):
        wide = expected.double()
        total += torch.stack([(got.double() - wide).square().sum(), wide.square().sum()]).cpu()
    error, scale = total.sqrt().tolist()
    return error, scale


def error_along_direction(u: Tensor, jvp: Tensor, gradient: Tensor, r: Tensor) -> Disagreement:
    """The error of ⟨u, jvp⟩, jvp = J r, against ⟨g, r⟩, relative to the norm of the terms g_i r_i of the latter."""
    terms = gradient.double() * r.double()
    difference = float((u.double() * jvp.double()).sum() - terms.sum())
    return Disagreement(relative_error(abs(difference), float(terms.norm())), None)


def relative_error(error: float, scale: float) -> float:
    """error/scale; 0 if both are 0, infinite if only the scale is."""
    if error == 0:
        return 0.0
    return error / scale if scale > 0 else math.inf
