"""The interface that every estimator shares: constructors store, `fit` computes, learned attributes end in `_`."""

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
from estimators.estimator.refitting import Refittable
from estimators.likelihoods import Likelihood, resolve_likelihood
from estimators.likelihoods.prediction import Prediction
from estimators.models.checks import check_model
from estimators.models.derivative_routes import FAILURES, is_ours, short
from estimators.models.exclusive import exclusively
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


class UncertaintyEstimator(Refittable):
    """Predictive variance of a trained network.

    Args:
        model: the trained network, in eval mode; outputs (B, C) or (B, ...), or an object with `.logits`. It is never
            changed.
        likelihood: "regression", "classification", "binary", "causal_lm", or an object such as
            `Gaussian(sigma_noise=0.5)` or, for segmentation, `Categorical(class_dim=1)`.
        prior_precision: δ > 0 of L(θ) = Σₙ −log p(yₙ|f(xₙ;θ)) + ½ Σ δ(θ−θ₀)² (sums, never means): a number, or a
            mapping from globs over parameter names to numbers (every parameter must match; the first match counts; 0
            allowed).
        prior_mean: θ₀.
        subset_of_weights: "all" (every parameter with requires_grad), "last_layer", or globs over parameter names.
    """

    batch_dependent: ClassVar[bool] = False
    _checkpoint: Checkpoint = Checkpoint()
    """Whether `variance` speaks of the set of x passed to it, rather than of each row by itself."""

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
        """Compute what `variance` needs from the training data, a re-iterable of (x, y) or of dicts with "labels".

        The model, its mode and the global random state are as before afterwards, also after an exception.
        `checkpoint` names a file. FineTune and LinearResponse write to it how far they are; the same call goes on from
        there in another process, and ends with the same variance. In the end it has the fit, as `save` would write it,
        and the same call reads it.
        `accelerator`, an `accelerate.Accelerator`, has its processes share the rows of every batch: all of them make
        this call with the same model and the whole loader, and end with the same fit.
        Errors: DataError, NonDeterministicError, ModelError, TooLargeError, and the method's own; StateError or
        ModelChangedError where the file belongs to another fit.
        """
        with preserved_random_state():
            objective = replace(self._objective(train_loader), process_group=ProcessGroup.of(accelerator))
            objective.process_group.check_alike(objective.theta, objective.batches)
            if checkpoint is None:
                self._checked_fit(objective, progress_bar=progress_bar)
            else:
                self._fit_on(Path(checkpoint), objective, progress_bar=progress_bar)
        self.objective_, self._calibrated_by = objective, None
        self._report_derivatives(objective)
        self.weight_checksum_ = weight_checksum(self.model, objective.network.params)
        if checkpoint is not None and objective.process_group.is_main_process:
            self.save(checkpoint)
        return self

    def _fit_on(self, path: Path, objective: Objective, *, progress_bar: bool) -> None:
        """Go on from a file, or begin."""
        if type(self)._learned is UncertaintyEstimator._learned:
            raise self._unsaved()
        self._checkpoint = CheckpointFile(
            path, self._about(objective, {}), objective.network.pass_counter, objective.process_group.is_main_process
        )
        try:
            finished = self._checkpoint.finished()
            if finished is None:
                self._checked_fit(objective, progress_bar=progress_bar)
            else:
                self._take_over(finished, objective)
        finally:
            self._checkpoint = Checkpoint()

    def _checked_fit(self, objective: Objective, *, progress_bar: bool) -> None:
        """`_fit`, whose derivatives are compared with plain autograd at every training row."""
        with objective.network.check.on_training_rows():
            self._fit(objective, progress_bar=progress_bar)
        objective.network.check.check_slope()
        objective.network.check.forget_gradients()

    def _objective(self, train_loader: Iterable[Any]) -> Objective:
        """L over the chosen subset, with model and data checked."""
        check_model(self.model)
        names = self._names(train_loader)
        network = Network(self.model, names)
        return self._over(network, TrainingData.checked(train_loader, network, self.likelihood))

    def _over(self, network: Network, batches: TrainingData) -> Objective:
        mean = torch.full_like(network.theta, self.prior_mean)
        prior = Prior(precision_vector(self.prior_precision, network), mean)
        return Objective(network, LabelLoss(self.likelihood), prior, batches)

    def _names(self, train_loader: Iterable[Any]) -> list[str]:
        if self.subset_of_weights == "last_layer":
            return last_linear_names(self.model, self._first_inputs(train_loader))
        return matching_names(self.model, self.subset_of_weights)

    def _first_inputs(self, train_loader: Iterable[Any]) -> PyTree:
        """The inputs of the first batch, known to fit the model."""
        x = first_batch(train_loader).x
        parameters = dict(self.model.named_parameters())
        own = {name: parameters[inner] for name, inner in parameter_names(self.model).items()}
        name = next(name for name, p in own.items() if p.is_floating_point() or p.is_complex())
        check_inputs(x, Network(self.model, [name]), what="training batch")
        return x

    @abstractmethod
    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:
        """The method's own part of `fit`."""

    @abstractmethod
    def _variance(self, x: PyTree) -> Tensor:
        """(M, C) of checked inputs."""

    def _covariance(self, x: PyTree) -> Tensor:  # noqa: ARG002
        """(M, C, C) of checked inputs."""
        raise UnsupportedError(
            "an estimator with a covariance between outputs",
            received=type(self).__name__,
            remedy="use variance(x), LinearizedLaplace, LastLayerLaplace, or RegVar with Pointwise or PosteriorDraws.",
        )

    def _sample(self, x: PyTree, n_samples: int, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """(n_samples, M, C) of checked inputs, jointly over rows."""
        raise UnsupportedError(
            "an estimator with function samples",
            received=type(self).__name__,
            remedy="use LinearizedLaplace, LastLayerLaplace or RegVar with PosteriorDraws.",
        )

    @exclusively
    def variance(self, x: PyTree, *, of: Functional | None = None) -> Tensor:
        """Epistemic variance of the outputs at M queries, (M, C), squared units of the output; noise is not in it.

        Outputs of another shape (M, ...) have variances of that shape. With `of=g` the variance of g(f(x)) by the delta
        method, diag(G Σ Gᵀ), (M, D): g maps the outputs of one row, or these and its inputs, to a tensor of D entries.
        """
        x = self._inputs(x)
        if of is None:
            return self._returned(self._checked_variance(x))
        self._check_query(x)
        try:
            return self._returned(self._variance_of(x, of))
        except FAILURES as error:
            if is_ours(error):
                raise
            raise OptionError(
                "of, a differentiable function of the outputs of one row, to a tensor of one shape at every row",
                received=f"one for which torch says: {short(error)}",
                remedy="of=lambda f: f[0] - f[1]; torch operations, not in place, with a result that depends on f.",
            ) from error

    def _checked_variance(self, x: PyTree) -> Tensor:
        """`variance` itself, after the checks of the query."""
        f = self._checked_outputs(x)
        return self._variance_given(x, f).reshape(self._variance_shape(f.shape))

    def _variance_given(self, x: PyTree, f: Tensor) -> Tensor:  # noqa: ARG002
        """`_variance` with the outputs f at θ̂ in the model's shape, for whom they spare a forward pass."""
        return self._variance(x)

    def _variance_shape(self, shape: torch.Size) -> torch.Size:
        """Of `variance(x)` where the outputs have this shape."""
        return shape

    def _variance_of(self, x: PyTree, of: Functional) -> Tensor:
        return variance_by_covariance(ComposedNetwork(self.network_, of).slopes(x), self._covariance(x))

    @exclusively
    def covariance(self, x: PyTree) -> Tensor:
        """Epistemic covariance between the outputs of each query, (M, C, C), C counting all outputs of a row."""
        x = self._inputs(x)
        self._check_query(x)
        return self._returned(self._covariance(x))

    @exclusively
    def sample(self, x: PyTree, n_samples: int, *, seed: int = 0) -> Tensor:
        """Function samples (n_samples, M, C), jointly over the rows of x, reproducible by `seed`."""
        x = self._inputs(x)
        shape = self._check_query(x)
        n_samples = checked_integer("n_samples", n_samples, at_least=1, remedy="ask for at least one sample.")
        generator = torch.Generator(self.network_.theta.device).manual_seed(checked_seed(seed))
        return self._returned(self._sample(x, n_samples, generator)).reshape(n_samples, *shape)

    @exclusively
    def predict(self, x: PyTree, *, link_approx: str = "probit", n_samples: int = 100) -> Prediction:
        """Predictive distribution: mean, epistemic variance, and noise or class probabilities.

        `link_approx` for classification and binary: "probit", or "mc" with `n_samples` function samples.
        """
        checked_choice("link_approx", link_approx, ("probit", "mc"))
        x = self._inputs(x)
        variance = self._predictive_variance(x)
        samples = self.sample(x, n_samples) if link_approx == "mc" and self.likelihood.kind != "regression" else None
        if link_approx == "mc" and samples is None:
            samples = variance[None]  # the likelihood says why regression has no Monte-Carlo link
        return self.likelihood.predict(self._mean(x), variance, samples)

    def _predictive_variance(self, x: PyTree) -> Tensor:
        """`variance`, as a distribution can have it."""
        return self.variance(x)

    def _mean(self, x: PyTree) -> Tensor:
        return self._returned(self.network_.shaped_outputs(x))

    def _returned(self, values: Tensor) -> Tensor:
        """The values in the dtype of the model's outputs, whatever they were computed in."""
        return values.to(self.network_.result_dtype or values.dtype)

    def _inputs(self, x: PyTree) -> PyTree:
        """A query as a pytree in which the tensors that rows share are marked, as in the training batches."""
        self._check_fitted()
        return self.objective_.batches.layout.mark(as_inputs(x))

    def _check_query(self, x: PyTree) -> torch.Size:
        """Refuse what is not a query; the shape of its outputs."""
        return self._checked_outputs(x).shape

    def _checked_outputs(self, x: PyTree) -> Tensor:
        """The outputs at θ̂ of marked inputs that are a query."""
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
        return self.network_.check_query(x, f)


def precision_vector(value: float | Mapping[str, float], network: Network) -> Tensor:
    """δ (P,) of a valid number or mapping of globs."""
    return delta_of_names(checked_precision(value), network.subset, network.theta)
