"""The Gaussian likelihood of regression."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from estimators.errors import DataError, OptionError, UnsupportedError
from estimators.likelihoods.base import Likelihood, Uniform, check_same_shape
from estimators.likelihoods.prediction import Prediction
from estimators.option_checks import as_number, shown

__all__ = ["Gaussian"]

_SIGMA_REMEDY = "pass the standard deviation of the noise, for instance the RMSE on validation data."


class Gaussian(Likelihood):
    """Independent Gaussian outputs, y ~ N(f, σ²), with f and y (B, C).

    −log p = Σ_c (y_c − f_c)² / 2σ_c² + log σ_c + ½ log 2π;  Λ = diag(1/σ²).

    Args:
        sigma_noise: σ > 0, the standard deviation of the noise in units of the target: a number, or one per
            output (C,).
        target_shift: the mean by which the targets were standardised, in original units: a number, or one per output
            (C,), such as `StandardScaler.mean_` of scikit-learn.
        target_scale: the standard deviation > 0 by which they were divided, such as `StandardScaler.scale_`.

    The network, the loaders and σ are in standardised units. `predict` returns the distribution of the original target,
    target_shift + target_scale · y. `variance`, `covariance` and `sample` are of the network's outputs.

    Example:
        >>> Gaussian(sigma_noise=0.5).hessian(torch.zeros(1, 2))
        tensor([[[4., 0.],
                 [0., 4.]]])
    """

    kind = "regression"

    def __init__(
        self,
        sigma_noise: float | Sequence[float] | Tensor = 1.0,
        *,
        target_shift: float | Sequence[float] | Tensor = 0.0,
        target_scale: float | Sequence[float] | Tensor = 1.0,
    ) -> None:
        self.sigma_noise = _checked_values("sigma_noise", sigma_noise, positive=True, remedy=_SIGMA_REMEDY)
        remedy = "StandardScaler.mean_ and .scale_, or the mean and standard deviation of the training targets."
        self.target_shift = _checked_values("target_shift", target_shift, positive=False, remedy=remedy)
        self.target_scale = _checked_values("target_scale", target_scale, positive=True, remedy=remedy)

    def __repr__(self) -> str:
        units = "" if self._standard else f", target_shift={self.target_shift}, target_scale={self.target_scale}"
        return f"Gaussian(sigma_noise={self.sigma_noise}{units})"

    @property
    def _standard(self) -> bool:
        """Whether targets and outputs have the same units."""
        return not (isinstance(self.target_shift, Tensor) or isinstance(self.target_scale, Tensor)) and (
            (self.target_shift, self.target_scale) == (0.0, 1.0)
        )

    def with_sigma(self, sigma_noise: float | Sequence[float] | Tensor) -> Gaussian:
        """Return a likelihood with another σ and the same units, of the same class.

        Args:
            sigma_noise: the new σ, as for the constructor.

        Returns:
            The new likelihood.
        """
        other = copy.copy(self)  # a subclass may have a constructor of its own
        other.sigma_noise = _checked_values("sigma_noise", sigma_noise, positive=True, remedy=_SIGMA_REMEDY)
        return other

    def _sigma(self, f: Tensor) -> Tensor:
        return self._per_output("sigma_noise", f)

    def _per_output(self, name: str, f: Tensor) -> Tensor:
        """Return an option as a tensor () or (C,) for outputs f (B, C)."""
        values = torch.as_tensor(getattr(self, name), dtype=f.dtype, device=f.device)
        if values.ndim == 1 and values.shape[0] != f.shape[-1]:
            raise DataError(
                f"one {name} for each of the {f.shape[-1]} outputs",
                received=f"{values.shape[0]} of them",
                remedy="pass a single number or one per output.",
            )
        return values

    def to_target_units(self, prediction: Prediction) -> Prediction:
        if self._standard:
            return prediction
        f = prediction.mean
        shift, scale = (
            self._per_output(name, f.flatten(1)).expand(f[:1].numel()).reshape(f.shape[1:])
            for name in ("target_shift", "target_scale")
        )
        return prediction.rescaled(shift=shift, scale=scale)

    def curvature_ratio(self, other: Likelihood) -> float | None:
        if self is other or not isinstance(other, Gaussian):
            return super().curvature_ratio(other)
        sigmas = (self.sigma_noise, other.sigma_noise)  # perhaps of two devices
        here, there = (torch.as_tensor(sigma, dtype=torch.float64, device="cpu") for sigma in sigmas)
        if here.ndim and there.ndim and here.shape != there.shape:
            return None
        ratio = (there / here).square().flatten()  # Λ = diag(1/σ²)
        return float(ratio[0]) if bool((ratio == ratio[0]).all()) else None

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        sigma = self._sigma(f)
        constant = (torch.log(sigma) + 0.5 * math.log(2 * math.pi)).expand(f.shape[-1]).sum()
        return 0.5 * ((f - y.flatten(1)) / sigma).square().sum(-1) + constant

    def expected_nll(self, f: Tensor, f_ref: Tensor) -> Tensor:
        return 0.5 * ((f - f_ref) / self._sigma(f)).square().sum(-1)

    def root_product(self, f: Tensor, v: Tensor) -> Tensor:
        return v / self._sigma(f)

    def hessian_product(self, f: Tensor, v: Tensor) -> Tensor:
        return v / self._sigma(f).square()

    def sample_labels(self, f: Tensor, uniform: Uniform) -> Tensor:
        u, eps = uniform(f.shape[-1]), torch.finfo(f.dtype).eps
        standard: Tensor = torch.special.ndtri(
            u.clamp(eps, 1 - eps)
        )  # a number that rounds to 1 has no finite quantile
        return f + self._sigma(f) * standard

    def check_targets(self, f: Tensor, y: Tensor) -> None:
        check_same_shape(f, y)
        for name in ("target_shift", "target_scale"):
            self._per_output(name, f.flatten(1))
        if y.dtype != f.dtype:
            raise DataError(
                f"targets of dtype {f.dtype}", received=f"{y.dtype}", remedy="convert: y.to(outputs.dtype)."
            )

    def predict(self, mean: Tensor, variance: Tensor, samples: Tensor | None) -> Prediction:
        if samples is not None:
            raise UnsupportedError(
                'link_approx="probit" for regression, whose predictive is Gaussian in closed form',
                received='"mc"',
                remedy="leave link_approx at its default, or call sample(x, n_samples).",
            )
        noise = self._sigma(mean.flatten(1)).square().expand_as(mean.flatten(1)).view_as(mean)
        return Prediction(mean, variance, self.kind, aleatoric_variance=noise, total_variance=variance + noise)


def _checked_values(name: str, value: object, *, positive: bool, remedy: str) -> float | Tensor:
    """Return an option as a number or a tensor (C,)."""
    number = None if isinstance(value, Tensor) and value.ndim else as_number(value)
    try:
        exact = None if isinstance(value, Tensor) else torch.float64  # Python's numbers are of that type
        values = torch.as_tensor(value if number is None else number, dtype=exact).detach()
        usable = values.ndim <= 1 and values.numel() > 0 and not values.is_complex()
        usable = usable and torch.as_tensor(value).dtype != torch.bool
        usable = usable and bool(torch.isfinite(values).all()) and not (positive and bool((values <= 0).any()))
    except (TypeError, ValueError, RuntimeError):
        usable = False
    if usable:
        return values if number is None else float(number)
    meaning = f"{name} > 0: a standard deviation" if positive else f"a finite {name}"
    raise OptionError(f"{meaning}, a number or one per output", received=shown(value), remedy=remedy)
