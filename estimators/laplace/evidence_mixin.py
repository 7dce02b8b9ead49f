"""`log_marginal_likelihood`: the evidence of a fit, at its prior precision and noise or at others."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from estimators.estimator.base import UncertaintyEstimator
from estimators.laplace.evidence import EvidenceFunction, log_marginal_likelihood, prior_vector
from estimators.models.exclusive import exclusively
from estimators.option_checks import PriorOption

__all__ = ["EvidenceMixin"]


class EvidenceMixin(UncertaintyEstimator):
    """`log_marginal_likelihood` for estimators that store the data's curvature.

    A subclass implements `evidence_function` and `_log_det_at`; `_evidence_index` if only some weights are uncertain.
    """

    @exclusively
    def log_marginal_likelihood(
        self, prior_precision: PriorOption | None = None, sigma_noise: float | Tensor | None = None
    ) -> Tensor:
        """Return the Laplace approximation of the log marginal likelihood (Immer et al. 2021, equation 7).

            log p(D) ≈ −L(θ̂) + ½ log|δ| − ½ log|A|

        It is over the uncertain weights: those of `subset_of_weights`, or of a subnetwork. All others are fixed, and
        their prior is left out. It is differentiable with respect to tensors that require a gradient.

        Args:
            prior_precision: another δ, at the same θ̂ and without a pass over the data for the curvature: a number, a
                tensor (P,), or a mapping from globs over parameter names to numbers or tensors of the parameter's
                shape. None: the fitted one.
            sigma_noise: another σ > 0 of a regression with one σ, a number or a tensor. None: the fitted one.

        Returns:
            A scalar, in nats.

        Raises:
            OptionError: for an invalid δ or σ, for a σ if the likelihood is not a Gaussian with one σ, and with
                hessian_structure="lowrank" for a δ that is not the fitted one times a number.
            UnsupportedError: for a form without a determinant ("cg"), for a δ of 0, and for another σ if the class of
                the likelihood overrides `nll` of Gaussian.
            NotFittedError: before `fit`.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from estimators import LastLayerLaplace
            >>> laplace = LastLayerLaplace(nn.Linear(3, 2), "regression").fit([(torch.randn(8, 3), torch.randn(8, 2))])
            >>> delta = torch.tensor(2.0, requires_grad=True)
            >>> laplace.log_marginal_likelihood(delta, sigma_noise=0.5).backward()
            >>> bool(delta.grad.isfinite())
            True
        """
        self._check_fitted()
        delta = self.objective_.prior.precision
        if prior_precision is not None:
            delta = prior_vector(prior_precision, self.network_)
        if sigma_noise is not None or delta.requires_grad:
            return self.evidence_function()(delta, sigma_noise)
        return log_marginal_likelihood(self.objective_, delta, self._log_det_at(delta), self._evidence_index)

    @abstractmethod
    def evidence_function(self) -> EvidenceFunction:
        """Return log p(D) as a differentiable function of δ and σ, with one forward pass over the data.

        Each call of the function costs a determinant and no pass: for optimisers. `log_marginal_likelihood` passes over
        the data at every call.

        Returns:
            A function of (δ, σ), as the arguments of `log_marginal_likelihood`, to a scalar in nats. σ None is that of
            the fit.

        Raises:
            NotFittedError: before `fit`, and for a fit that was loaded without its data. Calls of the function raise
                UnsupportedError and OptionError as `log_marginal_likelihood`.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from estimators import LinearizedLaplace
            >>> laplace = LinearizedLaplace(nn.Linear(3, 2), "regression", prior_precision=2.0)
            >>> evidence = laplace.fit([(torch.randn(8, 3), torch.randn(8, 2))]).evidence_function()
            >>> torch.allclose(evidence(3.0, None), laplace.log_marginal_likelihood(3.0))
            True
        """

    @abstractmethod
    def _log_det_at(self, delta: Tensor) -> Tensor:
        """Return log |A| at δ (P,), which has no graph."""

    @property
    def _evidence_index(self) -> Tensor | None:
        """The indices of the uncertain weights in θ; None: all of them."""
        return None
