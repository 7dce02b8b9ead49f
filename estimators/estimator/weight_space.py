"""The posterior over weights: samples, precision and covariance, Jacobians, and what follows from them at queries."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from estimators.curvature.base import Precision
from estimators.errors import DataError, ModelError, UnsupportedError
from estimators.estimator.cloning import CloningMixin
from estimators.likelihoods.prediction import Prediction
from estimators.models.exclusive import exclusively, wants_graph
from estimators.models.function_checks import check_displaced_outputs
from estimators.models.functionals import ComposedNetwork, Functional
from estimators.models.network import Network
from estimators.numerics.dtype import algebra_dtype
from estimators.numerics.pytrees import PyTree, split_rows, without_graph
from estimators.option_checks import checked_integer, checked_seed
from estimators.persistence.weight_checksum import check_unchanged
from estimators.runtime.memory import check_fits_memory, rows_per_chunk
from estimators.runtime.module_wrappers import plain_names

__all__ = ["WeightSpaceMixin", "check_jacobian_fits"]

_MATRIX_COPIES = 3
"""Matrices of the size of the result that its computation needs: the result, unit vectors, and a product."""


def check_jacobian_fits(network: Network, n_rows: int, n_outputs: int) -> int:
    """Return the bytes of one row of J (M, C, P).

    Args:
        network: with P weights.
        n_rows: M.
        n_outputs: C.

    Raises:
        TooLargeError: if J does not fit into memory as a whole.
    """
    row_bytes = n_outputs * network.n_parameters * network.theta.element_size()
    remedy = "fewer rows, or a smaller subset_of_weights."
    what = f"the Jacobian of {n_rows} rows with {n_outputs} outputs by {network.n_parameters} weights"
    check_fits_memory(what, 2 * n_rows * row_bytes, device=network.theta.device, remedy=remedy)
    return row_bytes


class WeightSpaceMixin(CloningMixin):
    """Queries about the posterior N(θ̂, A⁻¹) over the fitted weights θ (P,), and about the function along J = ∂f/∂θ.

    A subclass implements `_weight_precision` (A with its inverse) or `_covariance_along` (J Σ Jᵀ), and
    `_weight_displacements` (samples of θ − θ̂), as far as its posterior has them.
    """

    def _weight_precision(self) -> Precision:
        """Return A over θ."""
        raise self._without("a precision over weights", "LinearizedLaplace, LastLayerLaplace or SubnetworkLaplace.")

    def _weight_displacements(self, n_samples: int, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """Return samples (n_samples, P) of θ − θ̂."""
        remedy = "LinearizedLaplace, LastLayerLaplace, SubnetworkLaplace or RegVar with PosteriorDraws."
        raise self._without("samples of weights", remedy)

    def _covariance_along(self, jacobian: Tensor) -> Tensor:
        """Return J Σ Jᵀ (M, C, C) for J (M, C, P), differentiable in J if J has a graph."""
        precision = self._weight_precision()
        return (
            precision.differentiable_covariance(jacobian) if jacobian.requires_grad else precision.covariance(jacobian)
        )

    def _check_differentiable(self) -> None:
        """Raise UnsupportedError if results cannot have a graph to the inputs."""
        mine, base = type(self), WeightSpaceMixin
        if mine._weight_precision is base._weight_precision and mine._covariance_along is base._covariance_along:
            raise self._not_differentiable()

    def _not_differentiable(self) -> UnsupportedError:
        return UnsupportedError(
            "an estimator whose results are differentiable in x, since x requires a gradient",
            received=type(self).__name__,
            remedy="x.detach() or torch.no_grad(); or LinearizedLaplace, LastLayerLaplace, SubnetworkLaplace, or "
            "RegVar with PosteriorDraws.",
        )

    def _without(self, what: str, instead: str) -> UnsupportedError:
        return UnsupportedError(f"an estimator with {what}", received=type(self).__name__, remedy=f"use {instead}")

    @property
    def weight_names_(self) -> list[str]:
        """The names of the fitted parameters, in the order in which θ has their entries."""
        return list(self.network_.subset.shapes)

    @exclusively
    def sample_weights(self, n_samples: int, *, seed: int = 0) -> Tensor:
        """Return samples of the fitted weights from the posterior N(θ̂, A⁻¹).

        With the same seed, `sample(x, n_samples)` is the linearized function f(x; θ̂) + J(x)(θ − θ̂) at these weights.

        Args:
            n_samples: the number S of samples; for RegVar at most the number of its posterior draws.
            seed: the seed; the global random state is neither used nor changed.

        Returns:
            (S, P), in the order of `weight_names_`; `weights_to_state_dict` names the entries.

        Raises:
            UnsupportedError: if this estimator has no posterior over weights to sample from.
            NotFittedError, ModelChangedError: as `variance`.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from estimators import LinearizedLaplace
            >>> model = nn.Linear(3, 2)
            >>> laplace = LinearizedLaplace(model, "regression").fit([(torch.randn(8, 3), torch.randn(8, 2))])
            >>> weights = laplace.sample_weights(5)
            >>> weights.shape
            torch.Size([5, 8])
            >>> state = laplace.weights_to_state_dict(weights[0])
            >>> torch.func.functional_call(model, state, (torch.randn(4, 3),)).shape
            torch.Size([4, 2])
        """
        self._check_unchanged()
        n_samples = checked_integer("n_samples", n_samples, at_least=1, remedy="request at least one sample.")
        displaced = self._weight_displacements(n_samples, self._generator(seed))
        return self.theta_ + displaced.to(self.theta_.dtype)

    def weights_to_state_dict(self, weights: Tensor) -> dict[str, Tensor]:
        """Return weights as named tensors of the model, for `functional_call` or `load_state_dict(..., strict=False)`.

        Args:
            weights: θ (P,), or several (S, P).

        Returns:
            The tensors of the fitted parameters by their names in the model, with all names of a tied weight. They have
            the shapes and dtypes of the parameters, with S in front for several θ.

        Raises:
            DataError: for another number of weights.
            NotFittedError: before `fit`.
        """
        subset = self.network_.subset
        if weights.ndim not in (1, 2) or weights.shape[-1] != subset.n_parameters:
            raise DataError(
                f"weights (P,) or (S, P) with P = {subset.n_parameters}",
                received=f"shape {tuple(weights.shape)}",
                remedy="pass the result of sample_weights, or one row of it.",
            )
        rows = [subset.unflatten(row) for row in (weights[None] if weights.ndim == 1 else weights)]
        named = dict(self.model.named_parameters(remove_duplicate=False))
        own = {plain: name for name, plain in plain_names(self.model, named)}
        state: dict[str, Tensor] = {}
        for name in subset.shapes:
            entries = rows[0][name] if weights.ndim == 1 else torch.stack([row[name] for row in rows])
            entries = entries.to(
                named[own[name]].dtype
            )  # one tensor for all names: functional_call compares identities
            state |= dict.fromkeys((own[alias] for alias in subset.aliases[name]), entries)
        return state

    @exclusively
    def sample_nonlinear(self, x: PyTree, n_samples: int, *, seed: int = 0) -> Tensor:
        """Return the outputs of the network itself, without linearization, at sampled weights.

        The posterior is that of the linearized network. Far from θ̂ the network differs from it, and predictions through
        its own forward passes are often worse (Immer et al. 2021, section 3).

        Args:
            x: M query rows.
            n_samples: the number S of samples; each costs a forward pass.
            seed: the seed, as in `sample_weights`.

        Returns:
            (S, M, C) or (S, M, ...), in units of the output.

        Raises:
            UnsupportedError: if this estimator has no posterior over weights to sample from.
            ModelError: if the network cannot be computed at other weights.
            NotFittedError, ModelChangedError, DataError: as `variance`.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from estimators import LinearizedLaplace
            >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
            >>> laplace = LinearizedLaplace(model, "regression").fit([(torch.randn(8, 3), torch.randn(8, 2))])
            >>> laplace.sample_nonlinear(torch.randn(4, 3), 5).shape
            torch.Size([5, 4, 2])
        """
        return self._outputs_at(x, self.sample_weights(n_samples, seed=seed))

    def _outputs_at(self, x: PyTree, weights: Tensor) -> Tensor:
        """Return the outputs (S, M, ...) of the network at a query and weights (S, P)."""
        x = self._prepare_query(x)
        shape, network = self._check_query(x), self.network_
        try:
            check_displaced_outputs(network, without_graph(x))
        except ModelError as error:
            remedy = "sample(x, n_samples), the samples of the linearized function."
            raise ModelError(error.expected, received=error.received, remedy=remedy) from error
        with torch.set_grad_enabled(wants_graph(x)):
            samples = torch.stack([network(theta, x) for theta in weights])
        return self._to_output_dtype(samples).reshape(len(samples), *shape)

    @exclusively
    def predict_nonlinear(self, x: PyTree, *, n_samples: int = 100, seed: int = 0) -> Prediction:
        """Return the predictive distribution of the network itself, without linearization, over sampled weights.

        It is in original units (`target_shift` and `target_scale` of a Gaussian), and has the calibration of the fit,
        as `predict` does. `fit(val_loader=)` chose the variance scale s and the temperature (or noise factor) for the
        linearized predictions. Here s scales the covariance of the weights: each sample θₖ becomes θ̂ + √s (θₖ − θ̂),
        at which the network is evaluated. With s = 0 the prediction is that of the trained network.

        Args:
            x: M query rows.
            n_samples: the number S >= 2 of samples of the weights.
            seed: the seed, as in `sample_weights`.

        Returns:
            The prediction: mean and variance over the samples, and in classification the mean of their probabilities.
            Its `samples` are the outputs at the scaled weights: logits over the temperature, or in original units.

        Raises:
            UnsupportedError, ModelError: as `sample_nonlinear`.
            NotFittedError, ModelChangedError, DataError: as `variance`.

        Warns:
            UncalibratedWarning: once per fit, if a posterior at `prior_precision` was not calibrated.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from estimators import LinearizedLaplace
            >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
            >>> laplace = LinearizedLaplace(model, "classification", prior_precision=5.0)
            >>> laplace = laplace.fit([(torch.randn(8, 3), torch.randint(0, 2, (8,)))])
            >>> laplace.predict_nonlinear(torch.randn(4, 3), n_samples=20).probs.shape
            torch.Size([4, 2])
        """
        n_samples = checked_integer("n_samples", n_samples, at_least=2, remedy="a variance needs two samples.")
        weights = self.sample_weights(n_samples, seed=seed)
        if self.calibration_ is not None:
            weights = torch.lerp(self.theta_, weights, math.sqrt(self.calibration_.calibration.variance_scale))
        samples = self._outputs_at(x, weights)
        averaged = None if self.likelihood.kind == "regression" else samples
        made = self.likelihood.predict(samples.mean(0), samples.var(0), averaged)
        return self._finish_prediction(replace(made, samples=samples), is_scaled=True)

    @exclusively
    def jacobians(self, x: PyTree) -> tuple[Tensor, Tensor]:
        """Return the Jacobian J = ∂f/∂θ at the trained weights, and the outputs f.

        Args:
            x: M query rows.

        Returns:
            J (M, C, P), with P in the order of `weight_names_`, and f (M, C). C counts all outputs of a row.

        Raises:
            TooLargeError: if J does not fit into memory.
            NotFittedError, ModelChangedError, DataError: as `variance`.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from estimators import LinearizedLaplace
            >>> laplace = LinearizedLaplace(nn.Linear(3, 2), "regression")
            >>> jacobian, f = laplace.fit([(torch.randn(8, 3), torch.randn(8, 2))]).jacobians(torch.randn(4, 3))
            >>> jacobian.shape, f.shape
            (torch.Size([4, 2, 8]), torch.Size([4, 2]))
        """
        x = self._prepare_query(x)
        f = self._checked_outputs(x).flatten(1)
        if wants_graph(x):
            jacobian, f = self.network_.jacobian_with_graph(x), self.network_.shaped_with_graph(x).flatten(1)
        else:
            jacobian = torch.cat(list(self._jacobian_rows(without_graph(x), *f.shape)))
        return self._to_output_dtype(jacobian), self._to_output_dtype(f)

    def _jacobian_rows(self, x: PyTree, n_rows: int, n_outputs: int) -> Iterator[Tensor]:
        """Yield J of chunks of rows; raise TooLargeError if J does not fit into memory as a whole."""
        row_bytes = check_jacobian_fits(self.network_, n_rows, n_outputs)
        for part in split_rows(x, rows_per_chunk(4 * row_bytes)):
            yield self.network_.jacobian(part)

    @exclusively
    def posterior_precision(self) -> Tensor:
        """Return the posterior precision A of the fitted weights as a dense matrix.

        Returns:
            (P, P), in 1/weight², in the order of `weight_names_`. SubnetworkLaplace: (n, n), over `index_`.

        Raises:
            TooLargeError: if the matrix does not fit into memory.
            UnsupportedError: if this estimator has no precision over weights.
            NotFittedError: before `fit`.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from estimators import LinearizedLaplace
            >>> laplace = LinearizedLaplace(nn.Linear(3, 2), "regression", prior_precision=2.0)
            >>> precision = laplace.fit([(torch.randn(8, 3), torch.randn(8, 2))]).posterior_precision()
            >>> precision.shape, bool((precision.diagonal() > 2.0).all())
            (torch.Size([8, 8]), True)
        """
        unit = self._unit_matrix("the posterior precision")
        return self._weight_precision().multiply(unit)

    @exclusively
    def posterior_covariance(self) -> Tensor:
        """Return the posterior covariance A⁻¹ of the fitted weights as a dense matrix.

        Returns:
            (P, P), in weight², in the order of `weight_names_`. SubnetworkLaplace: (n, n), over `index_`.

        Raises:
            TooLargeError: if the matrix does not fit into memory.
            UnsupportedError: if this estimator has no precision over weights.
            NotFittedError: before `fit`.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from estimators import LinearizedLaplace
            >>> laplace = LinearizedLaplace(nn.Linear(3, 2), "regression", hessian_structure="kron")
            >>> laplace.fit([(torch.randn(8, 3), torch.randn(8, 2))]).posterior_covariance().shape
            torch.Size([8, 8])
        """
        unit = self._unit_matrix("the posterior covariance")
        covariance = self._weight_precision().solve(unit)
        return 0.5 * (covariance + covariance.T)

    def _unit_matrix(self, what: str) -> Tensor:
        """Return the unit matrix over θ; raise TooLargeError if a matrix of this size does not fit."""
        self._check_fitted()
        theta = self.theta_
        self._weight_precision()  # first the error of an estimator that has none
        check_fits_memory(
            f"{what} of {len(theta)} weights",
            _MATRIX_COPIES * len(theta) ** 2 * torch.empty(0, dtype=algebra_dtype(theta.device)).element_size(),
            device=theta.device,
            remedy="posterior_variance(), the diagonal, or a smaller subset_of_weights.",
        )
        return torch.eye(len(theta), dtype=theta.dtype, device=theta.device)

    @exclusively
    def posterior_variance(self) -> Tensor:
        """Return the posterior variance of each fitted weight, the diagonal of A⁻¹.

        It costs no matrix of P² numbers with "kron", "ekfac", "diag", "lowrank" and over the last layer. With
        inverse="cg" it costs P solves.

        Returns:
            (P,), in weight², in the order of `weight_names_`.

        Raises:
            UnsupportedError: if this estimator has no precision over weights.
            NotFittedError: before `fit`.
        """
        self._check_fitted()
        return self._weight_precision().marginal_variance(self.theta_)

    @exclusively
    def joint_covariance(self, x: PyTree) -> Tensor:
        """Return the epistemic covariance between all outputs of all rows, as a Gaussian process has it.

        Its blocks on the diagonal, of a row with itself, are `covariance(x)`. If x requires a gradient, the result has
        a graph.

        Args:
            x: M query rows.

        Returns:
            (M, C, M, C), in squared units of the output. C counts all outputs of a row.

        Raises:
            UnsupportedError: if this estimator has no covariance between rows.
            TooLargeError: if the Jacobian (M, C, P) does not fit into memory.
            NotFittedError, ModelChangedError, DataError: as `variance`.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from estimators import LinearizedLaplace
            >>> laplace = LinearizedLaplace(nn.Linear(3, 2), "regression")
            >>> laplace.fit([(torch.randn(8, 3), torch.randn(8, 2))]).joint_covariance(torch.randn(4, 3)).shape
            torch.Size([4, 2, 4, 2])
        """
        x = self._prepare_query(x)
        f = self._checked_outputs(x).flatten(1)
        if wants_graph(x):
            return self._to_output_dtype(self._joint_along(self.network_.jacobian_with_graph(x)))
        return self._to_output_dtype(self._joint_covariance(without_graph(x), f))

    def _joint_covariance(self, x: PyTree, f: Tensor) -> Tensor:
        """Return the covariance (M, C, M, C) at checked inputs with outputs f (M, C)."""
        if type(self)._covariance_along is WeightSpaceMixin._covariance_along:
            self._weight_precision()  # first the error of an estimator that has none
        return self._joint_along(torch.cat(list(self._jacobian_rows(x, *f.shape))))

    def _joint_along(self, jacobian: Tensor) -> Tensor:
        """Return J Σ Jᵀ (M, C, M, C) between all rows of J (M, C, P)."""
        m, c, p = jacobian.shape
        return self._covariance_along(jacobian.reshape(1, m * c, p)).reshape(m, c, m, c)

    @exclusively
    def sample_independent(self, x: PyTree, n_samples: int, *, seed: int = 0) -> Tensor:
        """Return samples of every output of every row on its own, N(f(x), variance(x)), without correlations.

        They cost the variance alone, whatever the number of outputs, and every estimator with a variance has them.

        Args:
            x: M query rows.
            n_samples: the number S of samples.
            seed: the seed; the global random state is neither used nor changed.

        Returns:
            (S, M, C) or (S, M, ...), in units of the output.

        Raises:
            NotFittedError, ModelChangedError, DataError: as `variance`.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from estimators import LastLayerLaplace
            >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
            >>> laplace = LastLayerLaplace(model, "regression").fit([(torch.randn(8, 3), torch.randn(8, 2))])
            >>> laplace.sample_independent(torch.randn(4, 3), 5, seed=1).shape
            torch.Size([5, 4, 2])
        """
        x = self._prepare_query(x)
        n_samples = checked_integer("n_samples", n_samples, at_least=1, remedy="request at least one sample.")
        mean, variance = self._mean(x), self._predictive_variance(x)
        noise = torch.randn(
            n_samples, *mean.shape, generator=self._generator(seed), dtype=mean.dtype, device=mean.device
        )
        return mean + variance.sqrt() * noise

    def _variance_with_graph(self, x: PyTree, of: Functional | None) -> Tensor:
        """Return the variance (M, C) at checked inputs, or (M, D) of a functional, with a graph to x."""
        network = self.network_ if of is None else ComposedNetwork(self.network_, of)
        jacobian = network.jacobian_with_graph(x)
        m, c, p = jacobian.shape
        return self._covariance_along(jacobian.reshape(m * c, 1, p)).reshape(m, c)

    def _sample_with_graph(self, x: PyTree, n_samples: int, generator: torch.Generator) -> Tensor:
        """Return function samples (n_samples, M, C) at checked inputs, with a graph to x."""
        displaced = self._weight_displacements(n_samples, generator).to(self.theta_.dtype)
        jacobian, f = self.network_.jacobian_with_graph(x), self.network_.shaped_with_graph(x).flatten(1)
        return f + torch.einsum("mcp,kp->kmc", jacobian, displaced)

    def _generator(self, seed: int) -> torch.Generator:
        """Return a generator on the device of the network."""
        return torch.Generator(self.network_.theta.device).manual_seed(checked_seed(seed))

    def _check_no_graph(self, x: PyTree, name: str) -> None:
        """Raise UnsupportedError if x requires a gradient, for a query whose results have none."""
        if wants_graph(x):
            raise UnsupportedError(
                f"inputs of {name} that require no gradient",
                received="inputs that require one",
                remedy="x.detach() or torch.no_grad().",
            )

    def _check_unchanged(self) -> None:
        """Raise NotFittedError before `fit`, and ModelChangedError if the model has changed since."""
        self._check_fitted()
        check_unchanged(self.model, self.weight_checksum_, self.network_.params)

    @abstractmethod
    def _prepare_query(self, x: PyTree) -> PyTree:
        """Return a query as a pytree that marks the tensors without a row dimension."""

    @abstractmethod
    def _check_query(self, x: PyTree) -> torch.Size:
        """Check a query, and return the shape of its outputs."""

    @abstractmethod
    def _checked_outputs(self, x: PyTree) -> Tensor:
        """Check a query, and return its outputs."""

    @abstractmethod
    def _mean(self, x: PyTree) -> Tensor:
        """Return the mean of the outputs."""

    @abstractmethod
    def _finish_prediction(self, prediction: Prediction, *, is_scaled: bool = False) -> Prediction:
        """Apply the calibration of the fit, and return the prediction in the units of the targets."""

    @abstractmethod
    def _predictive_variance(self, x: PyTree) -> Tensor:
        """Return a variance that is valid for a distribution, not negative."""

    @abstractmethod
    def _to_output_dtype(self, values: Tensor) -> Tensor:
        """Convert values to the dtype of the model's outputs."""
