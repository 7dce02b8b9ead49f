"""laplace-torch (Daxberger et al. 2021) behind the same interface; what it is known to get wrong is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from estimators.data.training_data import TrainingData
from estimators.errors import OptionError, UnsupportedError
from estimators.estimator.base import UncertaintyEstimator
from estimators.likelihoods import Gaussian, Likelihood
from estimators.likelihoods.categorical import Sites
from estimators.numerics.pytrees import PyTree, plain_inputs
from estimators.objective.objective import Objective
from estimators.option_checks import checked_choice
from estimators.runtime.optional import optional_module

__all__ = ["LaplaceTorch"]

_STRUCTURES, _SUBSETS = ("full", "kron", "diag"), ("all", "last_layer")
_BACKENDS = ("CurvlinopsGGN", "CurvlinopsEF", "BackPackGGN", "BackPackEF", "AsdlGGN", "AsdlEF")
_WRONG_STRUCTURES = {
    "gp": "its function-space form transposes the C × C blocks of all weights for C > 1",
    "lowrank": "its low-rank form needs a package that it no longer finds",
}


class LaplaceTorch(UncertaintyEstimator):
    """Linearized Laplace as laplace-torch 0.3 computes it, on a copy of the model.

    Args:
        prior_precision: δ, one number.
        subset_of_weights: "all" or "last_layer".
        hessian_structure: "full", "kron" or "diag".
        backend: the name of its class for curvature: "CurvlinopsGGN", "BackPackGGN", "AsdlGGN", or an empirical Fisher,
            "CurvlinopsEF", "BackPackEF", "AsdlEF".

    Its Kronecker form gives a bias a factor of its own, where `LinearizedLaplace` has it as a column of the weight.
    Errors: OptionError for what it gets wrong; UnsupportedError for likelihoods and networks that it does not take.
    """

    counts_passes = False

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        prior_precision: float = 1.0,
        prior_mean: float = 0.0,
        subset_of_weights: str = "all",
        hessian_structure: str = "kron",
        backend: str = "CurvlinopsGGN",
    ) -> None:
        super().__init__(
            model,
            likelihood,
            prior_precision=prior_precision,
            prior_mean=prior_mean,
            subset_of_weights=subset_of_weights,
        )
        self.hessian_structure, self.backend = hessian_structure, backend
        self._check_options()

    def _check_options(self) -> None:
        if isinstance(self.hessian_structure, str) and self.hessian_structure in _WRONG_STRUCTURES:
            raise _refused(self.hessian_structure, _WRONG_STRUCTURES[self.hessian_structure])
        for name, allowed in (
            ("hessian_structure", _STRUCTURES),
            ("backend", _BACKENDS),
            ("subset_of_weights", _SUBSETS),
        ):
            checked_choice(name, getattr(self, name), allowed, remedy="LinearizedLaplace has more.")
        if isinstance(self.prior_precision, dict):
            raise OptionError("one prior_precision", received="a mapping", remedy="LinearizedLaplace takes mappings.")
        kind = self.likelihood.kind
        if kind not in ("regression", "classification") or type(self.likelihood).__name__ == "CausalTokens":
            raise UnsupportedError(
                '"regression" or "classification"', received=repr(self.likelihood), remedy="LinearizedLaplace has it."
            )
        if isinstance(self.likelihood, Gaussian) and torch.as_tensor(self.likelihood.sigma_noise).numel() > 1:
            raise OptionError(
                "one sigma_noise for all outputs", received="one an output", remedy="LinearizedLaplace takes several."
            )
        fisher = self.backend.endswith("EF")
        if fisher and kind == "regression":
            raise _refused(f"{self.backend} in regression", "its empirical Fisher there is 2σ² times that of the loss")
        if self.backend == "CurvlinopsEF" and (self.subset_of_weights, self.hessian_structure) == (
            "last_layer",
            "diag",
        ):
            raise _refused('CurvlinopsEF with "last_layer" and "diag"', "it returns the prior")

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:
        shape = objective.network.shaped_outputs(next(iter(objective.batches)).x).shape
        if len(shape) > 2:
            raise UnsupportedError(
                "outputs (B, C)", received=f"shape {tuple(shape)}", remedy="LinearizedLaplace takes any shape."
            )
        if any(isinstance(objective.likelihood.given(batch.y), Sites) for batch in objective.batches):
            raise _refused("ignored rows (label -100)", "it takes their curvature to be that of labelled ones")
        options: dict[str, Any] = {"prior_precision": self.prior_precision, "prior_mean": self.prior_mean}
        if isinstance(self.likelihood, Gaussian):
            options["sigma_noise"] = self.likelihood.sigma_noise
        if self.subset_of_weights == "last_layer":
            options["last_layer_name"] = next(iter(objective.network.subset.shapes)).rpartition(".")[0]
        with _its_ways(objective.theta):
            laplace = _imported()
            try:
                fitted = laplace.Laplace(
                    copy.deepcopy(self.model),
                    self.likelihood.kind,
                    subset_of_weights=self.subset_of_weights,
                    hessian_structure=self.hessian_structure,
                    backend=getattr(laplace.curvature, self.backend),
                    **options,
                )
                fitted.fit(_Rows(objective.batches), progress_bar=progress_bar)
            except Exception as error:
                raise UnsupportedError(
                    f'a network that laplace-torch takes with "{self.hessian_structure}" and {self.backend}',
                    received=f"one for which it says {type(error).__name__}: {error}",
                    remedy="LinearizedLaplace of the same structure, or RegVar.",
                ) from error
        self.laplace_ = fitted

    def _refit(self, fitted: Self, objective: Objective, changed: frozenset[str]) -> None:
        if changed != {"prior_precision"}:
            return super()._refit(fitted, objective, changed)
        with _its_ways(objective.theta):  # it keeps the curvature of the data apart from the prior
            self.laplace_ = copy.copy(fitted.laplace_)
            self.laplace_.prior_precision = self.prior_precision
        return None

    def _variance(self, x: PyTree) -> Tensor:
        return self._covariance(x).diagonal(dim1=-2, dim2=-1)

    def _covariance(self, x: PyTree) -> Tensor:
        with _its_ways(self.theta_):
            covariance: Tensor = self.laplace_._glm_predictive_distribution(x)[1]
        return covariance.detach()


@dataclass(frozen=True)
class _Rows:
    """Batches as its loader: it asks for the length of `dataset`, and for tuples or dicts."""

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
def _its_ways(theta: Tensor) -> Iterator[None]:
    """It makes tensors of the default dtype on the default device, and warns of its own dependencies."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(theta.dtype)
    try:
        with theta.device, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)


def _imported() -> Any:  # noqa: ANN401
    """The package. It loads torchvision, which must be of the same build as torch."""
    return optional_module(
        "laplace",
        purpose="compute what laplace-torch computes",
        install='"bdl-bench[baselines]", and a torchvision of the same build as torch',
    )


def _refused(what: str, why: str) -> OptionError:
    return OptionError(
        "what laplace-torch 0.3 computes rightly",
        received=f"{what}: {why}",
        remedy="LinearizedLaplace or LastLayerLaplace, or a GGN backend.",
    )
