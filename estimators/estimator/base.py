"""The interface of every estimator: constructors store, `fit` computes, learned attributes end in `_`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from estimators.data.batch import first_batch
from estimators.data.checks import check_inputs
from estimators.data.distributed import ProcessGroup
from estimators.data.inputs import as_inputs
from estimators.data.training_data import TrainingData
from estimators.errors import DataError, OptionError, UnsupportedError
from estimators.estimator.cloning import CloningMixin
from estimators.estimator.export import ExportMixin
from estimators.likelihoods import Likelihood, resolve_likelihood
from estimators.likelihoods.prediction import BRIDGES, Prediction, from_covariance
from estimators.models.checks import check_model
from estimators.models.derivative_routes import FAILURES, is_final_error, short
from estimators.models.exclusive import exclusively
from estimators.models.function_checks import check_query
from estimators.models.functionals import ComposedNetwork, Functional, variance_by_covariance
from estimators.models.last_linear import last_linear_names
from estimators.models.network import Network
from estimators.models.subsets import SubsetSpec, checked_subset, delta_of_names, matching_names
from estimators.numerics.pytrees import PyTree, n_rows
from estimators.objective.objective import LabelLoss, Objective, Prior
from estimators.option_checks import checked_choice, checked_integer, checked_number, checked_precision, checked_seed
from estimators.persistence.checkpoint import Checkpoint, CheckpointFile
from estimators.persistence.weight_checksum import check_unchanged, weight_checksum
from estimators.runtime.module_wrappers import parameter_names, unwrapped
from estimators.runtime.rng import preserved_random_state

__all__ = ["Functional", "Prediction", "UncertaintyEstimator"]


class UncertaintyEstimator(CloningMixin, ExportMixin):
    """The predictive variance of a trained network. Base class of all estimators.

    The trained network is taken as a maximum of the posterior with the loss (sums over rows, never means)

        L(θ) = Σₙ −log p(yₙ | f(xₙ; θ)) + ½ Σ δ (θ − θ₀)²

    A subclass implements `_fit` and `_variance`, and where it can `_covariance` and `_sample`.

    Args:
        model: the trained network, in eval mode. Its outputs are (B, C) or (B, ...), or an object with `.logits`. It is
            never changed.
        likelihood: "regression", "classification", "binary", "causal_lm", or an object such as
            `Gaussian(sigma_noise=0.5)` or, for segmentation, `Categorical(class_dim=1)`.
        prior_precision: δ > 0, in 1/weight²: a number, or a mapping from globs over parameter names to numbers. Every
            parameter must match a glob, the first match counts, and a value may be 0.
        prior_mean: θ₀, one number for all weights.
        subset_of_weights: "all" (every parameter with requires_grad), "last_layer", or globs over parameter names. The
            other parameters are fixed.

    Raises:
        OptionError: for an invalid option.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from estimators import LinearizedLaplace
        >>> estimator = LinearizedLaplace(nn.Linear(3, 2), "classification", prior_precision=2.0)
        >>> estimator = estimator.fit([(torch.randn(8, 3), torch.randint(0, 2, (8,)))])
        >>> estimator.predict(torch.randn(4, 3)).probs.shape
        torch.Size([4, 2])
    """

    batch_dependent: ClassVar[bool] = False
    """Whether the variance of a query row depends on the other rows of the query."""
    _checkpoint: Checkpoint = Checkpoint()

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        prior_precision: float | Mapping[str, float] = 1.0,
        prior_mean: float = 0.0,
        subset_of_weights: SubsetSpec = "all",
    ) -> None:
        self.model = unwrapped(model)
        self.likelihood = resolve_likelihood(likelihood)
        self.prior_precision = checked_precision(prior_precision)
        self.prior_mean = checked_number("prior_mean", prior_mean, remedy="0, or the mean of all weights.")
        self.subset_of_weights = checked_subset(subset_of_weights)

    @exclusively
    def fit(
        self,
        train_loader: Iterable[Any],
        *,
        progress_bar: bool = False,
        checkpoint: str | Path | None = None,
        accelerator: Any = None,  # noqa: ANN401
    ) -> Self:
        """Compute what `variance` needs from the training data.

        The model, its mode and the global random state do not change, even if an exception is raised.

        Args:
            train_loader: the training data, a re-iterable of (x, y) or of dicts with "labels".
            progress_bar: whether to show progress.
            checkpoint: a file. A finished fit is stored there as `save` writes it, and the same call loads it.
                LinearResponse also writes its progress: the same call in another process continues from there, and
                ends with the same variance. Other fits, such as those by FineTune, start again if interrupted.
            accelerator: an `accelerate.Accelerator`, whose processes share the rows of every batch. Each process makes
                this call with the same model and the whole loader, and ends with the same fit.

        Returns:
            This estimator, fitted.

        Raises:
            DataError: for invalid batches.
            NonDeterministicError: if two passes over the data differ.
            ModelError: for a model that cannot be used.
            TooLargeError: if a matrix does not fit into memory.
            StateError, ModelChangedError: if the checkpoint belongs to another fit.
        """
        with preserved_random_state():
            objective = replace(self._build_objective(train_loader), process_group=ProcessGroup.of(accelerator))
            objective.process_group.check_equal(objective.theta, objective.batches)
            if checkpoint is None:
                self._checked_fit(objective, progress_bar=progress_bar)
            else:
                self._fit_with_checkpoint(Path(checkpoint), objective, progress_bar=progress_bar)
        self.objective_, self._calibrated_by = objective, None
        self._report_derivatives(objective)
        self.weight_checksum_ = weight_checksum(self.model, objective.network.params)
        if checkpoint is not None and objective.process_group.is_main_process:
            self.save(checkpoint)
        return self

    def _fit_with_checkpoint(self, path: Path, objective: Objective, *, progress_bar: bool) -> None:
        """Continue the fit in a file, load it if it is finished, or begin one."""
        if type(self)._get_fit_state is UncertaintyEstimator._get_fit_state:
            raise self._unsaved()
        self._checkpoint = CheckpointFile(
            path, self._about(objective, {}), objective.network.pass_counter, objective.process_group.is_main_process
        )
        try:
            finished = self._checkpoint.finished()
            if finished is None:
                self._checked_fit(objective, progress_bar=progress_bar)
            else:
                self._load_fit_state(finished, objective)
        finally:
            self._checkpoint = Checkpoint()

    def _checked_fit(self, objective: Objective, *, progress_bar: bool) -> None:
        """Run `_fit`, and compare its derivatives with plain autograd at every training row."""
        with objective.network.check.on_training_rows():
            self._fit(objective, progress_bar=progress_bar)
            self._report_passes(objective)
        objective.network.check.check_gradient()
        objective.network.check.forget_gradients()

    def _build_objective(self, train_loader: Iterable[Any]) -> Objective:
        """Return L over the chosen parameters, with model and data checked."""
        check_model(self.model)
        names = self._parameter_names(train_loader)
        network = Network(self.model, names)
        return self._make_objective(network, TrainingData.checked(train_loader, network, self.likelihood))

    def _make_objective(self, network: Network, batches: TrainingData) -> Objective:
        mean = torch.full_like(network.theta, self.prior_mean)
        prior = Prior(precision_vector(self.prior_precision, network), mean)
        return Objective(network, LabelLoss(self.likelihood), prior, batches)

    def _parameter_names(self, train_loader: Iterable[Any]) -> list[str]:
        if self.subset_of_weights == "last_layer":
            return last_linear_names(self.model, self._first_inputs(train_loader))
        return matching_names(self.model, self.subset_of_weights)

    def _first_inputs(self, train_loader: Iterable[Any]) -> PyTree:
        """Return the inputs of the first batch. Raises DataError if they do not fit the model."""
        x = first_batch(train_loader).x
        parameters = dict(self.model.named_parameters())
        own = {name: parameters[inner] for name, inner in parameter_names(self.model).items()}
        name = next(name for name, p in own.items() if p.is_floating_point() or p.is_complex())
        check_inputs(x, Network(self.model, [name]), what="training batch")
        return x

    @abstractmethod
    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:
        """Compute what `_variance` needs."""

    @abstractmethod
    def _variance(self, x: PyTree) -> Tensor:
        """Return the variance (M, C) at checked inputs."""

    def _covariance(self, x: PyTree) -> Tensor:  # noqa: ARG002
        """Return the covariance (M, C, C) at checked inputs."""
        raise UnsupportedError(
            "an estimator with a covariance between outputs",
            received=type(self).__name__,
            remedy="use variance(x), LinearizedLaplace, LastLayerLaplace, or RegVar with Pointwise or PosteriorDraws.",
        )

    def _sample(self, x: PyTree, n_samples: int, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """Return function samples (n_samples, M, C) at checked inputs, jointly over rows."""
        raise UnsupportedError(
            "an estimator with function samples",
            received=type(self).__name__,
            remedy="use LinearizedLaplace, LastLayerLaplace or RegVar with PosteriorDraws.",
        )

    @exclusively
    def variance(self, x: PyTree, *, of: Functional | None = None) -> Tensor:
        """Return the epistemic variance of the outputs, without observation noise.

        Args:
            x: M query rows.
            of: a function g of the outputs of one row, or of its outputs and inputs, to D numbers. Returned is then the
                variance of g(f(x)) by the delta method, diag(G Σ Gᵀ) with G = ∂g/∂f.

        Returns:
            (M, C) or the shape of the outputs, in squared units of the output; with `of`, (M, D).

        Raises:
            NotFittedError: before `fit`.
            ModelChangedError: if the model has changed since the fit.
            DataError: for an invalid query.
            OptionError: if `of` is not differentiable by torch.
        """
        x = self._prepare_query(x)
        if of is None:
            return self._to_output_dtype(self._checked_variance(x))
        self._check_query(x)
        try:
            return self._to_output_dtype(self._variance_of(x, of))
        except FAILURES as error:
            if is_final_error(error):
                raise
            raise OptionError(
                "of, a differentiable function of the outputs of one row to a tensor of a fixed shape",
                received=f"one for which torch raises: {short(error)}",
                remedy="of=lambda f: f[0] - f[1]; torch operations, not in place, with a result that depends on f.",
            ) from error

    def _checked_variance(self, x: PyTree) -> Tensor:
        """Check the query, and return its variance in the shape of the outputs."""
        f = self._checked_outputs(x)
        return self._variance_with_outputs(x, f).reshape(self._variance_shape(f.shape))

    def _variance_with_outputs(self, x: PyTree, f: Tensor) -> Tensor:  # noqa: ARG002
        """Return `_variance`; an estimator that needs the outputs f at θ̂ overrides this and saves a forward pass."""
        return self._variance(x)

    def _variance_shape(self, shape: torch.Size) -> torch.Size:
        """Return the shape of `variance(x)` for outputs of a shape."""
        return shape

    def _variance_of(self, x: PyTree, of: Functional) -> Tensor:
        return variance_by_covariance(ComposedNetwork(self.network_, of).function_jacobian(x), self._covariance(x))

    @exclusively
    def covariance(self, x: PyTree) -> Tensor:
        """Return the epistemic covariance between the C outputs of each row.

        Args:
            x: M query rows.

        Returns:
            (M, C, C), in squared units of the output.

        Raises:
            UnsupportedError: if this estimator has no covariance.
            NotFittedError, ModelChangedError, DataError: as `variance`.
        """
        x = self._prepare_query(x)
        self._check_query(x)
        return self._to_output_dtype(self._covariance(x))

    @exclusively
    def sample(self, x: PyTree, n_samples: int, *, seed: int = 0) -> Tensor:
        """Return samples of the function f, jointly over the rows of x.

        Args:
            x: M query rows.
            n_samples: the number S of samples.
            seed: the seed; the global random state is neither used nor changed.

        Returns:
            (S, M, C), in units of the output.

        Raises:
            UnsupportedError: if this estimator has no function samples.
            NotFittedError, ModelChangedError, DataError: as `variance`.
        """
        x = self._prepare_query(x)
        shape = self._check_query(x)
        n_samples = checked_integer("n_samples", n_samples, at_least=1, remedy="request at least one sample.")
        generator = torch.Generator(self.network_.theta.device).manual_seed(checked_seed(seed))
        return self._to_output_dtype(self._sample(x, n_samples, generator)).reshape(n_samples, *shape)

    @exclusively
    def predict(self, x: PyTree, *, link_approx: str = "probit", n_samples: int = 100) -> Prediction:
        """Return the predictive distribution: mean, epistemic variance, and noise or class probabilities.

        Args:
            x: M query rows.
            link_approx: how classification and binary average probabilities over the posterior: "probit" (MacKay 1992),
                "mc" with function samples, or for classification "bridge" or "bridge_norm" (the Laplace bridge to a
                Dirichlet distribution, from the covariance between the classes; Hobbhahn et al. 2022).
            n_samples: the number of function samples for "mc".

        Returns:
            The prediction; in regression with `total_variance`, else with `probs` and `entropy`.

        Raises:
            OptionError: for an unknown `link_approx`, and for "mc" in regression.
            UnsupportedError: for "mc" if this estimator has no function samples, and for a bridge without a covariance,
                or unless there is one class prediction per row.
            NotFittedError, ModelChangedError, DataError: as `variance`.
        """
        checked_choice("link_approx", link_approx, ("probit", "mc", *BRIDGES))
        x = self._prepare_query(x)
        if link_approx in BRIDGES:
            return self._bridge_prediction(x, link_approx)
        variance = self._predictive_variance(x)
        samples = self.sample(x, n_samples) if link_approx == "mc" and self.likelihood.kind != "regression" else None
        if link_approx == "mc" and samples is None:
            samples = variance[None]  # the likelihood says why regression has no Monte-Carlo link
        return self.likelihood.predict(self._mean(x), variance, samples)

    def _bridge_prediction(self, x: PyTree, link_approx: str) -> Prediction:
        """Return the prediction by the Laplace bridge."""
        shape = self._check_query(x)
        if self.likelihood.kind != "classification" or len(shape) != 2:
            raise UnsupportedError(
                f'classification with outputs (M, C) for link_approx="{link_approx}"',
                received=f"{self.likelihood!r} with outputs of shape {tuple(shape)}",
                remedy='link_approx="probit".',
            )
        return from_covariance(self._mean(x), self._to_output_dtype(self._covariance(x)), link_approx=link_approx)

    def _predictive_variance(self, x: PyTree) -> Tensor:
        """Return a variance that is valid for a distribution, not negative."""
        return self.variance(x)

    def _mean(self, x: PyTree) -> Tensor:
        return self._to_output_dtype(self.network_.shaped_outputs(x))

    def _to_output_dtype(self, values: Tensor) -> Tensor:
        """Convert values to the dtype of the model's outputs."""
        return values.to(self.network_.result_dtype or values.dtype)

    def _prepare_query(self, x: PyTree) -> PyTree:
        """Return a query as a pytree that marks the tensors without a row dimension, as in the training batches."""
        self._check_fitted()
        return self.objective_.batches.layout.mark(as_inputs(x))

    def _check_query(self, x: PyTree) -> torch.Size:
        """Check a query, and return the shape of its outputs."""
        return self._checked_outputs(x).shape

    def _checked_outputs(self, x: PyTree) -> Tensor:
        """Check marked inputs of a query, and return the outputs at θ̂."""
        self._check_fitted()
        check_unchanged(self.model, self.weight_checksum_, self.network_.params)
        f = check_inputs(x, self.network_, what="query")
        if not len(f):
            raise DataError("at least one query row", received="none", remedy="leave out empty batches.")
        if len(f) != n_rows(x):
            raise DataError(
                f"one output row for each of the {n_rows(x)} rows of the query",
                received=f"outputs of shape {tuple(f.shape)}",
                remedy="put rows first in every tensor of the query, and leave them first in forward.",
            )
        return check_query(self.network_, x, f)


def precision_vector(value: float | Mapping[str, float], network: Network) -> Tensor:
    """Return δ (P,) from a number or a mapping of globs. Raises OptionError for an invalid one."""
    return delta_of_names(checked_precision(value), network.subset, network.theta)
