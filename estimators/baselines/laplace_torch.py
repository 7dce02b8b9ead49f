"""laplace-torch (Daxberger et al. 2021) with the common interface. Options that it computes wrongly are rejected."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn

from estimators.data.training_data import TrainingData
from estimators.errors import OptionError, UnsupportedError
from estimators.estimator.base import UncertaintyEstimator
from estimators.estimator.options import CommonOptions, inherits_options
from estimators.likelihoods import Gaussian, Likelihood
from estimators.likelihoods.categorical import Sites
from estimators.numerics.pytrees import PyTree, plain_inputs
from estimators.objective.objective import Objective
from estimators.option_checks import checked_choice
from estimators.runtime.optional import optional_module

__all__ = ["LaplaceTorch"]

_STRUCTURES, _SUBSETS = ("full", "kron", "diag"), ("all", "last_layer")
_BACKENDS = ("CurvlinopsGGN", "CurvlinopsEF", "BackPackGGN", "BackPackEF", "AsdlGGN", "AsdlEF")
# tests/estimators/test_laplace_torch_baseline.py shows these faults beside closed forms.
_WRONG_STRUCTURES = {
    "gp": "its function-space form transposes the C × C blocks of all weights for C > 1",
    "lowrank": "its low-rank form imports a package that no longer exists",
}


class LaplaceTorch(UncertaintyEstimator):
    """Linearized Laplace as laplace-torch 0.3 computes it, on a copy of the model (Daxberger et al. 2021).

    By default all weights have a Kronecker-factored posterior; laplace-torch's own default is the last layer. Its
    Kronecker form has a separate factor for a bias; `LinearizedLaplace` treats a bias as a column of the weight.

    Args:
        model: the trained network, in eval mode; it is not changed.
        likelihood: "regression" or "classification", or a `Gaussian` or `Categorical` with its parameters.
        prior_mean: θ₀, the mean of the prior, one number.
        prior_precision: δ > 0, one number.
        subset_of_weights: "all" or "last_layer".
        hessian_structure: "full", "kron" or "diag".
        backend: the name of a curvature class of laplace-torch: "CurvlinopsGGN", "BackPackGGN", "AsdlGGN", or an
            empirical Fisher, "CurvlinopsEF", "BackPackEF", "AsdlEF".

    Attributes:
        laplace_: the fitted object of laplace-torch.

    Raises:
        OptionError: for options with which laplace-torch is known to be wrong.
        UnsupportedError: for a likelihood that laplace-torch does not have; `fit` raises it for such a network.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> laplace = LaplaceTorch(nn.Linear(3, 2), "regression")
        >>> laplace = laplace.fit([(torch.randn(8, 3), torch.randn(8, 2))])  # doctest: +SKIP
        >>> laplace.variance(torch.randn(4, 3)).shape  # doctest: +SKIP
        torch.Size([4, 2])
    """

    uses_prior_precision = True

    counts_passes = False

    @inherits_options(UncertaintyEstimator, CommonOptions)
    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        hessian_structure: str = "kron",
        backend: str = "CurvlinopsGGN",
        **options: Unpack[CommonOptions],
    ) -> None:
        super().__init__(model, likelihood, **options)
        self.hessian_structure, self.backend = hessian_structure, backend
        self._check_options()

    def _check_options(self) -> None:
        if isinstance(self.hessian_structure, str) and self.hessian_structure in _WRONG_STRUCTURES:
            raise _known_fault(self.hessian_structure, _WRONG_STRUCTURES[self.hessian_structure])
        for name, allowed in (
            ("hessian_structure", _STRUCTURES),
            ("backend", _BACKENDS),
            ("subset_of_weights", _SUBSETS),
        ):
            checked_choice(name, getattr(self, name), allowed, remedy="LinearizedLaplace has more.")
        for name in ("prior_precision", "prior_mean"):
            if not isinstance(getattr(self, name), float):
                remedy = "LinearizedLaplace takes mappings and tensors."
                raise OptionError(f"one {name}", received="a mapping or tensor", remedy=remedy)
        kind = self.likelihood.kind
        if kind not in ("regression", "classification") or type(self.likelihood).__name__ == "CausalTokens":
            raise UnsupportedError(
                '"regression" or "classification"', received=repr(self.likelihood), remedy="LinearizedLaplace has it."
            )
        if isinstance(self.likelihood, Gaussian) and torch.as_tensor(self.likelihood.sigma_noise).numel() > 1:
            raise OptionError(
                "one sigma_noise for all outputs", received="one per output", remedy="LinearizedLaplace takes several."
            )
        if self.backend.endswith("EF") and kind == "regression":
            raise _known_fault(f"{self.backend} in regression", "its empirical Fisher is 2σ² times that of the loss")
        if self.backend == "CurvlinopsEF" and (self.subset_of_weights, self.hessian_structure) == (
            "last_layer",
            "diag",
        ):
            raise _known_fault('CurvlinopsEF with "last_layer" and "diag"', "it returns the prior")

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:
        shape = objective.network.shaped_outputs(next(iter(objective.batches)).x).shape
        if len(shape) > 2:
            raise UnsupportedError(
                "outputs (B, C)", received=f"shape {tuple(shape)}", remedy="LinearizedLaplace takes any shape."
            )
        # `given` returns `Sites`, the rows that have a label, if some labels are -100.
        if any(isinstance(objective.likelihood.given(batch.y), Sites) for batch in objective.batches):
            raise _known_fault("ignored rows (label -100)", "it counts their curvature as that of labelled ones")
        options: dict[str, Any] = {"prior_precision": self.prior_precision, "prior_mean": self.prior_mean}
        if isinstance(self.likelihood, Gaussian):
            options["sigma_noise"] = self.likelihood.sigma_noise
        if self.subset_of_weights == "last_layer":
            options["last_layer_name"] = next(iter(objective.network.subset.shapes)).rpartition(".")[0]
        with _laplace_torch_defaults(objective.theta):
            laplace = optional_module(  # it imports torchvision, whose build must match that of torch
                "laplace",
                purpose="compute a posterior with laplace-torch",
                install='"bdl-bench[baselines]", and a torchvision that matches torch',
            )
            try:
                fitted = laplace.Laplace(
                    copy.deepcopy(self.model),
                    self.likelihood.kind,
                    subset_of_weights=self.subset_of_weights,
                    hessian_structure=self.hessian_structure,
                    backend=getattr(laplace.curvature, self.backend),
                    **options,
                )
                fitted.fit(_LaplaceTorchLoader(objective.batches), progress_bar=progress_bar)
            except Exception as error:
                raise UnsupportedError(
                    f'a network that laplace-torch takes with "{self.hessian_structure}" and {self.backend}',
                    received=f"one for which it raises {type(error).__name__}: {error}",
                    remedy="LinearizedLaplace of the same structure, or RegVar.",
                ) from error
        self.laplace_ = fitted

    def _refit(self, fitted: Self, objective: Objective, changed: frozenset[str]) -> None:
        if changed != {"prior_precision"}:
            return super()._refit(fitted, objective, changed)
        with _laplace_torch_defaults(objective.theta):  # laplace-torch stores the data's curvature apart from the prior
            self.laplace_ = copy.copy(fitted.laplace_)
            self.laplace_.prior_precision = float(objective.prior.precision[0])
        return None

    def _variance(self, x: PyTree) -> Tensor:
        return self._covariance(x).diagonal(dim1=-2, dim2=-1)

    def _covariance(self, x: PyTree) -> Tensor:
        with _laplace_torch_defaults(self.theta_):
            covariance: Tensor = self.laplace_._glm_predictive_distribution(x)[1]
        return covariance.detach()


@dataclass(frozen=True)
class _LaplaceTorchLoader:
    """Batches as the loader that laplace-torch expects: of tuples or dicts, with the length of `dataset`."""

    batches: TrainingData

    @property
    def dataset(self) -> range:
        return range(self.batches.n_data)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            x = plain_inputs(batch.x)
            yield {**x, "labels": batch.y} if isinstance(x, dict) else (x, batch.y)

    def __len__(self) -> int:
        return sum(1 for _ in self.batches)


@contextmanager
def _laplace_torch_defaults(theta: Tensor) -> Iterator[None]:
    """Set the default dtype and device, with which laplace-torch makes tensors, and silence its warnings.

    They are global to the process: tensors that another thread makes meanwhile have them, too.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(theta.dtype)
    try:
        with theta.device, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)


def _known_fault(what: str, why: str) -> OptionError:
    return OptionError(
        "options that laplace-torch 0.3 computes correctly",
        received=f"{what}: {why}",
        remedy="LinearizedLaplace or LastLayerLaplace.",
    )
