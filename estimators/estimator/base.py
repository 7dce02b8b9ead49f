"""The interface of every estimator: constructors store, `fit` computes, learned attributes end in `_`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from estimators.calibration.validation import ValidationRows
from estimators.data.batch import first_batch
from estimators.data.checks import check_inputs
from estimators.data.distributed import ProcessGroup
from estimators.data.inputs import as_inputs
from estimators.data.training_data import TrainingData
from estimators.errors import DataError, OptionError, UnsupportedError
from estimators.estimator.calibrating import CalibrationMixin
from estimators.estimator.export import ExportMixin
from estimators.estimator.options import changed_options
from estimators.estimator.weight_space import WeightSpaceMixin
from estimators.likelihoods import Likelihood, resolve_likelihood
from estimators.likelihoods.prediction import BRIDGES, LINKS, MONTE_CARLO, Prediction, from_covariance
from estimators.models.checks import check_model
from estimators.models.exclusive import exclusively, wants_graph
from estimators.models.failures import FAILURES, is_final_error, short
from estimators.models.function_checks import check_query
from estimators.models.functionals import ComposedNetwork, Functional, variance_by_covariance
from estimators.models.last_linear import last_linear_names
from estimators.models.network import Network
from estimators.models.subsets import SubsetSpec, checked_subset, delta_of_names, matching_names, mean_of_names
from estimators.numerics.pytrees import PyTree, n_rows, without_graph
from estimators.objective.objective import LabelLoss, Objective, Prior
from estimators.option_checks import (
    PriorOption,
    checked_choice,
    checked_integer,
    checked_precision,
    checked_prior_mean,
    shown,
)
from estimators.persistence.checkpoint import Checkpoint, CheckpointFile
from estimators.persistence.weight_checksum import weight_checksum
from estimators.runtime.module_wrappers import parameter_names, unwrapped
from estimators.runtime.rng import preserved_random_state

__all__ = ["Functional", "Prediction", "UncertaintyEstimator"]


class UncertaintyEstimator(CalibrationMixin, WeightSpaceMixin, ExportMixin):
    """The predictive variance of a trained network. Base class of all estimators.

    The trained network is taken as a maximum of the posterior with the loss (sums over rows, never means)

        L(θ) = Σₙ −log p(yₙ | f(xₙ; θ)) + ½ Σ δ (θ − θ₀)²

    A subclass implements `_fit` and `_variance`, and where it can `_covariance` and `_sample`.

    Args:
        model: the trained network, in eval mode. Its outputs are (B, C) or (B, ...), or an object with `.logits`. It is
            never changed.
        likelihood: "regression", "classification", "binary", "causal_lm", or an object such as
            `Gaussian(sigma_noise=0.5)` or, for segmentation, `Categorical(class_dim=1)`.
        prior_precision: δ > 0, in 1/weight²: a number, a tensor (P,) with one for each weight, or a mapping from globs
            over parameter names to numbers or to tensors of the shape of the parameter. Every parameter must match a
            glob, the first match counts, and a value may be 0.
        prior_mean: θ₀: a number, a tensor (P,), or a mapping as for `prior_precision`, such as a state dict.
        subset_of_weights: "all" (every parameter with requires_grad), "last_layer", or globs over parameter names. The
            other parameters are fixed.

    Attributes:
        calibration_: what `fit` chose on its validation rows, with every score; None without validation rows.
        prior_precision_: the prior precision of the fit.

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
        prior_precision: PriorOption = 1.0,
        prior_mean: PriorOption = 0.0,
        subset_of_weights: SubsetSpec = "all",
    ) -> None:
        self.model = unwrapped(model)
        self.likelihood = resolve_likelihood(likelihood)
        self.prior_precision = checked_precision(prior_precision)
        self.prior_mean = checked_prior_mean(prior_mean)
        self.subset_of_weights = checked_subset(subset_of_weights)

    def __repr__(self) -> str:
        """Return the network, the likelihood, the options that differ from their defaults, and the state of the fit."""
        n_parameters = sum(p.numel() for p in self.model.parameters())
        parts = [f"{type(self.model).__name__} of {n_parameters:,} parameters", shown(self.likelihood, 80)]
        parts += [f"{name}={' '.join(shown(value, 80).split())}" for name, value in changed_options(self).items()]
        if not hasattr(self, "objective_"):
            return f"{type(self).__name__}({', '.join(parts)}; not fitted)"
        fit = f"fitted on {self.n_data_:,} rows"
        if self.calibration_ is not None:
            fit += f", calibrated on {self.calibration_.validation_rows:,}"
        return f"{type(self).__name__}({', '.join(parts)}; {fit})"

    @exclusively
    def fit(
        self,
        train_loader: Iterable[Any],
        *,
        val_loader: Iterable[Any] | None = None,
        progress_bar: bool = False,
        checkpoint: str | Path | None = None,
        accelerator: Any = None,  # noqa: ANN401
    ) -> Self:
        """Compute what `variance` needs from the training data, and calibrate it on validation data if there are any.

        With a validation loader, `fit` also chooses three numbers by the smallest mean −log p(y | x) of its rows: the
        prior precision, a scale of the variance, and a softmax temperature (in regression a factor of σ). `predict` is
        then calibrated, and `calibration_` has every score. A weak penalty keeps temperature and noise near 1 if there
        are few rows. The candidates include the network without variance, with its best temperature or noise and
        without any change, so that its mean −log p(y | x) is not made worse on these rows.

        The prior precision is chosen if this fit stores the data's curvature: among values from a tenth to ten times
        the given one, without a pass over the training data. If each value would need a new fit, as with RegVar, the
        given one is kept; `estimators.tune` tries others.

        `variance`, `covariance` and `sample` are those of the posterior at the chosen prior precision,
        `prior_precision_`. Variance scale and temperature are applied to predictions only.

        The model, its mode and the global random state do not change, even if an exception is raised.

        Args:
            train_loader: the training data, a re-iterable of (x, y) or of dicts with "labels".
            val_loader: rows that the network was not trained on, a re-iterable of the same kind. None: no calibration.
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

        Warns:
            TuningBoundaryWarning: if the validation rows choose the last scale, temperature or noise of a range.
        """
        validation = None if val_loader is None else ValidationRows.of(val_loader)
        with preserved_random_state():
            objective = replace(self._build_objective(train_loader), process_group=ProcessGroup.of(accelerator))
            objective.process_group.check_equal(objective.theta, objective.batches)
            if validation is not None:
                self._check_validation(validation, objective)
            if checkpoint is None:
                self._checked_fit(objective, progress_bar=progress_bar)
            else:
                self._fit_with_checkpoint(Path(checkpoint), objective, progress_bar=progress_bar)
        self._set_fitted(objective, None)
        self._report_derivatives(objective)
        self.weight_checksum_ = weight_checksum(self.model, objective.network.params)
        if validation is not None:
            with preserved_random_state():
                self._calibrate(validation)
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
        return Objective(network, LabelLoss(self.likelihood), self._prior(network, self.prior_precision), batches)

    def _prior(self, network: Network, precision: PriorOption) -> Prior:
        mean = mean_of_names(self.prior_mean, network.subset, network.theta, network.module)
        return Prior(precision_vector(precision, network), mean)

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

    def _score(self, x: PyTree) -> Tensor:  # noqa: ARG002
        """Return a score (M,) of each row at checked inputs, higher if it is farther from the training rows."""
        raise UnsupportedError(
            "an estimator with an out-of-distribution score of its own",
            received=type(self).__name__,
            remedy="use DDU; or the variance, or the entropy of predict(x), as a score.",
        )

    @exclusively
    def variance(self, x: PyTree, *, of: Functional | None = None) -> Tensor:
        """Return the epistemic variance of the outputs, without observation noise.

        If x requires a gradient, the result has a graph to x, as in torch, and so have those of `covariance`, `sample`,
        `joint_covariance` and `predict`. This costs more; x.detach() or torch.no_grad() avoids it. Gradients are
        compared with finite differences for networks in float64 only, at the first row of a new kind of query: in
        float32 a custom `torch.autograd.Function` whose backward autograd cannot differentiate gives wrong ones.

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
            UnsupportedError: if x requires a gradient, and results of this estimator have none, or a wrong one.
            OptionError: if `of` is not differentiable by torch.
        """
        x = self._prepare_query(x)
        with_graph = wants_graph(x)
        if of is None and not with_graph:
            return self._to_output_dtype(self._checked_variance(without_graph(x)))
        shape = self._check_query(x)
        if of is None:
            return self._to_output_dtype(self._variance_with_graph(x, None)).reshape(self._variance_shape(shape))
        try:
            variance = self._variance_with_graph(x, of) if with_graph else self._variance_of(without_graph(x), of)
            return self._to_output_dtype(variance)
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

    def _mean_and_variance(self, x: PyTree) -> tuple[Tensor, Tensor]:
        """Return mean and variance at a query; an estimator that finds both by one computation overrides this."""
        return self._mean(x), self._checked_variance(x)

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
        if wants_graph(x):
            return self._to_output_dtype(self._covariance_along(self.network_.jacobian_with_graph(x)))
        return self._to_output_dtype(self._covariance(without_graph(x)))

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
        generator = self._generator(seed)
        if wants_graph(x):
            samples = self._sample_with_graph(x, n_samples, generator)
        else:
            samples = self._sample(without_graph(x), n_samples, generator)
        return self._to_output_dtype(samples).reshape(n_samples, *shape)

    @exclusively
    def score(self, x: PyTree) -> Tensor:
        """Return the method's own out-of-distribution score of each row.

        A higher score says that a row is less like the training rows. Only the order of scores has a meaning that is
        the same for all methods; units are those of the method, such as nats for the negative log-density of `DDU`.

        Args:
            x: M query rows.

        Returns:
            (M,), finite, in float64 on devices that have it.

        Raises:
            UnsupportedError: if this estimator has no score of its own.
            NotFittedError, ModelChangedError, DataError: as `variance`.
        """
        x = self._prepare_query(x)
        self._check_query(x)
        return self._score(without_graph(x)).detach()

    def update(self, new_loader: Iterable[Any]) -> Self:  # noqa: ARG002
        """Add training rows to this fit, at the same weights, if its curvature is a sum over rows.

        Args:
            new_loader: the new rows, a re-iterable as for `fit`, without the rows of the fit.

        Returns:
            This estimator, over all rows.

        Raises:
            UnsupportedError: if rows cannot be added to a fit of this estimator.
            NotFittedError: before `fit`.
        """
        self._check_fitted()
        raise UnsupportedError(
            "an estimator to whose fit rows can be added",
            received=type(self).__name__,
            remedy="fit(train_loader) with all rows; or LinearizedLaplace, LastLayerLaplace or SubnetworkLaplace.",
        )

    def log_marginal_likelihood(
        self,
        prior_precision: PriorOption | None = None,  # noqa: ARG002
        sigma_noise: float | Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Return the log marginal likelihood log p(D) of the fit, if this estimator has one.

        Args:
            prior_precision: another δ. None: the fitted one.
            sigma_noise: another σ of a regression. None: the fitted one.

        Returns:
            A scalar, in nats.

        Raises:
            UnsupportedError: if this estimator has no marginal likelihood.
            NotFittedError: before `fit`.
        """
        self._check_fitted()
        raise UnsupportedError(
            "an estimator with a marginal likelihood",
            received=type(self).__name__,
            remedy="LinearizedLaplace, LastLayerLaplace or SubnetworkLaplace.",
        )

    @exclusively
    def predict(self, x: PyTree, *, link_approx: str = "probit", n_samples: int = 100) -> Prediction:
        """Return the predictive distribution: mean, epistemic variance, and noise or class probabilities.

        After a fit with validation data it is calibrated. After a fit without them it is that of the plain posterior at
        the given prior precision, which is often much too wide or too narrow, and the first call warns.

        Args:
            x: M query rows.
            link_approx: how classification and binary average probabilities over the posterior: "probit" (MacKay 1992),
                "mc" with function samples, "mc_independent" with those of `sample_independent`, which neglect the
                correlations between classes and cost less if there are many, or for classification "bridge" or
                "bridge_norm" (the Laplace bridge to a Dirichlet distribution, from the covariance between the classes;
                Hobbhahn et al. 2022).
            n_samples: the number of function samples for "mc" and "mc_independent".

        Returns:
            The prediction; in regression with `total_variance`, else with `probs` and `entropy`.

        Raises:
            OptionError: for an unknown `link_approx`, and for "mc" in regression.
            UnsupportedError: for "mc" if this estimator has no function samples, and for a bridge without a covariance,
                or unless there is one class prediction per row.
            NotFittedError, ModelChangedError, DataError: as `variance`.

        Warns:
            UncalibratedWarning: once per fit, if a posterior at `prior_precision` was not calibrated.
        """
        return self._finish_prediction(self.predict_uncalibrated(x, link_approx=link_approx, n_samples=n_samples))

    @exclusively
    def predict_uncalibrated(self, x: PyTree, *, link_approx: str = "probit", n_samples: int = 100) -> Prediction:
        """Return the predictive distribution of the posterior at `prior_precision_`, without calibration.

        It is in the units of the network's outputs: `target_shift` and `target_scale` of a Gaussian are not applied.
        An estimator with its own predictive distribution overrides this.

        Args:
            x: M query rows.
            link_approx: "probit", "mc", "mc_independent", "bridge" or "bridge_norm", as for `predict`.
            n_samples: the number of function samples for "mc" and "mc_independent".

        Returns:
            The prediction.

        Raises:
            OptionError, UnsupportedError, NotFittedError, ModelChangedError, DataError: as `predict`.
        """
        checked_choice("link_approx", link_approx, LINKS)
        x = self._prepare_query(x)
        if link_approx in BRIDGES:
            return self._bridge_prediction(x, link_approx)
        variance = self._predictive_variance(x)
        samples = None
        if link_approx in MONTE_CARLO and self.likelihood.kind != "regression":
            sample = self.sample if link_approx == "mc" else self.sample_independent
            samples = sample(x, n_samples)
        elif link_approx in MONTE_CARLO:
            samples = variance[None]  # the likelihood says why regression has no Monte-Carlo link
        made = self.likelihood.predict(self._mean(x), variance, samples)
        return made if samples is None else replace(made, link_approx=link_approx)

    def _bridge_prediction(self, x: PyTree, link_approx: str) -> Prediction:
        """Return the prediction by the Laplace bridge."""
        shape = self._check_query(x)
        if self.likelihood.kind != "classification" or len(shape) != 2:
            raise UnsupportedError(
                f'classification with outputs (M, C) for link_approx="{link_approx}"',
                received=f"{self.likelihood!r} with outputs of shape {tuple(shape)}",
                remedy='link_approx="probit".',
            )
        return from_covariance(self._mean(x), self.covariance(x), link_approx=link_approx)

    def _predictive_variance(self, x: PyTree) -> Tensor:
        """Return a variance that is valid for a distribution, not negative."""
        return self.variance(x)

    def _mean(self, x: PyTree) -> Tensor:
        if wants_graph(x):
            return self._to_output_dtype(self.network_.shaped_with_graph(x))
        return self._to_output_dtype(self.network_.shaped_outputs(x))

    def _to_output_dtype(self, values: Tensor) -> Tensor:
        """Convert values to the dtype of the model's outputs."""
        return values.to(self.network_.result_dtype or values.dtype)

    def _prepare_query(self, x: PyTree) -> PyTree:
        """Return a query as a pytree that marks the tensors without a row dimension, as in the training batches."""
        self._check_fitted()
        x = self.objective_.batches.layout.mark(as_inputs(x))
        if wants_graph(x):
            self._check_differentiable()
        return x

    def _check_query(self, x: PyTree) -> torch.Size:
        """Check a query, and return the shape of its outputs."""
        return self._checked_outputs(x).shape

    def _checked_outputs(self, x: PyTree) -> Tensor:
        """Check marked inputs of a query, and return the outputs at θ̂."""
        self._check_unchanged()
        x = without_graph(x)
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


def precision_vector(value: PriorOption, network: Network) -> Tensor:
    """Return δ (P,) from the option `prior_precision`. Raises OptionError for an invalid one."""
    return delta_of_names(checked_precision(value), network.subset, network.theta)
