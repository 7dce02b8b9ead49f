"""The last linear layer as a function of its features, for closed forms and for RegVar's Rao-Blackwellisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from estimators.errors import EstimatorError, NoLastLayerError, UnsupportedError
from estimators.likelihoods import Likelihood
from estimators.likelihoods.categorical import Sites
from estimators.models.failures import FAILURES, short
from estimators.models.feature_reduction import FeatureReduction, reduction_of
from estimators.models.last_linear import LastLinear, find_last_linear
from estimators.models.network import Network
from estimators.models.outputs import without_inference
from estimators.numerics.dtype import algebra_dtype, to_algebra_dtype
from estimators.numerics.pytrees import PyTree
from estimators.objective.objective import Objective

__all__ = ["FeatureHook", "LastLayer", "PositionBatch"]

_COMPARISON = "last layer"
"""Name of the comparison of the features in the report."""
_CHUNK_ELEMENTS = 2**24
"""Numbers in the outer products φφᵀ and Λ of one chunk of rows: 128 MiB each in float64."""


@dataclass(frozen=True)
class LastLayer:
    """A last layer f = Wφ + b, with D inputs, whose entries of θ form a matrix (C, E): E = D, or D + 1 with a bias.

    Attributes:
        network: the network that the layer ends.
        layer: the names of the layer and of its parameters.
        n_outputs: C.
        n_features: E, which counts the constant feature 1 if the bias is a parameter.
        feature_reduction: how the features of several positions become those of a row; None for one position.
    """

    network: Network
    layer: LastLinear
    n_outputs: int
    n_features: int
    feature_reduction: FeatureReduction | None = None

    @classmethod
    def of(
        cls,
        network: Network,
        x: PyTree,
        *,
        name: str | None = None,
        feature_reduction: FeatureReduction | None = None,
    ) -> LastLayer:
        """The layer that produces the outputs at x, or the one called `name`.

        Raises:
            NoLastLayerError: there is none, or the one called `name` does not produce the outputs.
        """
        try:
            with network.pass_counter.calls_of(network.module):
                found = find_last_linear(network.module, x, name=name, feature_reduction=feature_reduction)
        except EstimatorError:
            raise
        except FAILURES as error:  # a scripted module takes no hooks, for instance
            which = f"{type(error).__name__} while the last layer was looked for: {short(error)}"
            raise _not_last(name or "(any)", which) from error
        return cls.from_description(network, asdict(found), feature_reduction)

    @classmethod
    def from_description(
        cls, network: Network, description: dict[str, str | None], feature_reduction: FeatureReduction | None = None
    ) -> LastLayer:
        """The layer of a `description()`."""
        layer = LastLinear(**description)  # type: ignore[arg-type]
        linear = network.module.get_submodule(layer.name)
        assert isinstance(linear, nn.Linear)
        n_features = linear.in_features + (layer.bias is not None)
        return cls(network, layer, linear.out_features, n_features, feature_reduction)

    def description(self) -> dict[str, str | None]:
        """The names of the layer and of its parameters, in JSON types."""
        return asdict(self.layer)

    def features(self, x: PyTree) -> Tensor:
        """φ (M, E) at θ̂, with a 1 appended if the bias is a parameter.

        Raises:
            UnsupportedError: the layer is applied to several positions of a row.
        """
        with self.capture_features(x) as hook:
            f = self.network.shaped_outputs(x)
        self.check(x, f, hook)
        return hook.features

    def check(self, x: PyTree, f: Tensor, hook: FeatureHook) -> None:
        """Check that the layer ends the network at x: f = Wφ + b (B, ..., C), and ∂f/∂W = φ.

        Raises:
            NoLastLayerError: outputs are masked, gated or detached after the layer, or its weights are used elsewhere.
        """
        check = self.network.check
        if not check.enabled:
            return
        self._check_outputs(f, hook)
        if not check.is_due(_COMPARISON, x):
            return
        u = check.cotangent(x, f)
        gradient = u.flatten(0, -2).T @ hook.at_positions.flatten(0, -2).to(u)  # Σ u φᵀ, (C, E)
        parts = [gradient] if self.layer.bias is None else [gradient[:, :-1], gradient[:, -1]]
        product = torch.cat([part.flatten() for part in parts])
        found = self.network.gradient_error(x, u.flatten(1), product, self.layer.parameter_names)
        if not found.within(check.tolerance()):
            raise _not_last(self.layer.name, f"a gradient with respect to its weights that {found}")
        check.report.record_agreement(_COMPARISON, len(f), found.error)

    def _check_outputs(self, f: Tensor, hook: FeatureHook) -> None:
        """Raise NoLastLayerError unless f (B, ..., C) is Wφ + b."""
        weight, bias, inputs = self._linear.weight, self._linear.bias, hook.inputs
        expected = None if inputs is None else F.linear(inputs.to(weight.dtype), weight, bias).detach()
        if expected is None or expected.shape != f.shape:
            raise _not_last(self.layer.name, "outputs that the layer did not make")
        scale = float(f.double().abs().max()) if f.numel() else 0.0
        difference = float((expected.double() - f.double()).abs().max()) if f.numel() else 0.0
        if not difference <= self.network.check.tolerance() * scale:
            raise _not_last(self.layer.name, f"rows whose outputs differ from the layer's by {difference:.2g}")

    @property
    def _linear(self) -> nn.Linear:
        """The layer in the network's module."""
        linear = self.network.module.get_submodule(self.layer.name)
        assert isinstance(linear, nn.Linear)
        return linear

    @property
    def frozen_bias(self) -> Tensor:
        """The part of the outputs that does not depend on θ, (C,): a bias that is not trained, or 0."""
        bias = self._linear.bias
        if bias is None or self.layer.bias is not None:
            return self.network.theta.new_zeros(self.n_outputs)
        return bias.detach()

    @contextmanager
    def capture_features(self, x: PyTree) -> Iterator[FeatureHook]:
        """Capture the features of a forward at x inside the context."""
        reduce = reduction_of(self.feature_reduction, self.network.module)
        reduce_here = None if reduce is None else lambda features: reduce(features, x)
        hook = FeatureHook(bias=self.layer.bias is not None, reduce=reduce_here)
        handle = self._linear.register_forward_pre_hook(hook)
        try:
            yield hook
        finally:
            handle.remove()

    def to_matrix(self, theta: Tensor) -> Tensor:
        """The layer's entries (..., C, E) of vectors (..., P)."""
        slices = self.network.subset.slices
        weight: Tensor = theta[..., slices[self.layer.weight]].unflatten(-1, (self.n_outputs, -1))
        if self.layer.bias is None:
            return weight
        return torch.cat([weight, theta[..., slices[self.layer.bias], None]], dim=-1)

    def to_theta(self, matrix: Tensor) -> Tensor:
        """Vectors (..., P) with a matrix (..., C, E) as the layer's entries, and 0 outside the layer."""
        slices = self.network.subset.slices
        theta = matrix.new_zeros(*matrix.shape[:-2], self.network.n_parameters)
        weight = matrix if self.layer.bias is None else matrix[..., :-1]
        theta[..., slices[self.layer.weight]] = weight.flatten(-2)
        if self.layer.bias is not None:
            theta[..., slices[self.layer.bias]] = matrix[..., -1]
        return theta

    @property
    def mask(self) -> Tensor:
        """A mask (P,) of bool: whether an entry of θ belongs to the layer."""
        return self.network.subset.mask(self.layer.parameter_names).to(self.network.theta.device)

    def full_curvature(self, objective: Objective) -> Tensor:
        """Σₙ Λₙ ⊗ φₙφₙᵀ (C, E, C, E) in `algebra_dtype`, n counting the positions of all rows."""
        c, e = self.n_outputs, self.n_features
        total = objective.theta.new_zeros(c * c, e * e, dtype=algebra_dtype(objective.theta.device))
        chunk = max(1, _CHUNK_ELEMENTS // max(e * e, c * c))
        for batch in self._position_batches(objective):
            for f, phi in zip(batch.f.split(chunk), batch.features.split(chunk), strict=True):
                lam = batch.likelihood.hessian(f)
                outer = phi[:, :, None] * phi[:, None, :]
                total.addmm_(lam.reshape(-1, c * c).T, outer.reshape(-1, e * e))
        return total.reshape(c, c, e, e).permute(0, 2, 1, 3)

    def kron_factors(self, objective: Objective) -> tuple[Tensor, Tensor]:
        """Mean Λ (C, C) and Σ φφᵀ (E, E) in `algebra_dtype`, over the positions of all rows."""
        theta, n = to_algebra_dtype(objective.theta[:0]), 0
        mean_hessian = theta.new_zeros(self.n_outputs, self.n_outputs)
        gram = theta.new_zeros(self.n_features, self.n_features)
        for batch in self._position_batches(objective):
            gram += batch.features.T @ batch.features
            mean_hessian += batch.likelihood.hessian_sum(batch.f)
            n += len(batch.f)
        return mean_hessian / n, gram

    def diagonal(self, objective: Objective) -> Tensor:
        """Σₙ Λₙ,cc φₙₑ² (C, E) in `algebra_dtype`, n counting the positions of all rows."""
        total = to_algebra_dtype(objective.theta[:0]).new_zeros(self.n_outputs, self.n_features)
        for batch in self._position_batches(objective):
            total += batch.likelihood.hessian_diagonal(batch.f).T @ batch.features.square()
        return total

    def _position_batches(self, objective: Objective) -> Iterator[PositionBatch]:
        """The labelled positions of each batch, in `algebra_dtype`; the rows if a row has a single output vector."""
        for batch in objective.batches:
            with self.capture_features(batch.x) as hook:
                shaped = self.network.shaped_outputs(batch.x)
            self.check(batch.x, shaped, hook)
            f = to_algebra_dtype(shaped.flatten(0, -2))
            features, likelihood = (
                to_algebra_dtype(hook.at_positions.flatten(0, -2)),
                objective.likelihood.given(batch.y),
            )
            if not isinstance(likelihood, Sites):  # `Sites`: several labels per row, or rows without a label
                yield PositionBatch(likelihood, f, features)
                continue
            if likelihood.classes_first:
                raise UnsupportedError(
                    "classes along the last dimension, where a linear layer has its outputs",
                    received="a likelihood with class_dim=1",
                    remedy='subset_of_weights="all", or class_dim=-1.',
                )
            labelled = likelihood.kept.flatten()
            yield PositionBatch(likelihood.site, f[labelled], features[labelled])


def _not_last(name: str, received: str) -> NoLastLayerError:
    """The error for a layer that does not end the network."""
    return NoLastLayerError(
        f"a last layer {name!r} that ends the network at every row, and whose weights are used nowhere else",
        received=received,
        remedy='subset_of_weights="all" with LinearizedLaplace or RegVar, or move what comes after the layer out of '
        "the network.",
    )


@dataclass(frozen=True)
class PositionBatch:
    """Positions that the layer is applied to, such as the tokens or pixels of a batch.

    Attributes:
        likelihood: the likelihood of one position.
        f: outputs (R, C).
        features: φ (R, E).
    """

    likelihood: Likelihood
    f: Tensor
    features: Tensor


class FeatureHook:
    """A forward pre-hook that captures the input of a layer, and reduces it if there is a feature reduction.

    `bias` tells whether a 1 is appended to features.
    """

    def __init__(self, *, bias: bool, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        self._bias, self._reduce = bias, reduce
        self._last: Tensor | None = None
        self._n_calls = 0

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:  # noqa: ARG002
        self._last = arguments[0].clone() if self._reduce is None else self._reduce(arguments[0])
        self._n_calls += 1

    @property
    def inputs(self) -> Tensor | None:
        """The input (M, ..., D) of the layer; None if the layer was not called exactly once."""
        return None if self._n_calls != 1 or self._last is None else without_inference(self._last.detach())

    @property
    def features(self) -> Tensor:
        """φ (M, E), with a 1 appended if the bias is a parameter.

        Raises:
            UnsupportedError: the layer is applied to several positions of a row.
        """
        features = self.at_positions
        if features.ndim != 2:
            raise UnsupportedError(
                "features of shape (B, D) before the last layer",
                received=f"{features.ndim} dimensions",
                remedy='variance(x) of LastLayerLaplace, or LinearizedLaplace with subset_of_weights="last_layer".',
            )
        return features

    @property
    def at_positions(self) -> Tensor:
        """φ (M, ..., E) at all positions of each row, with a 1 appended if the bias is a parameter."""
        return self.with_graph.detach()

    @property
    def with_graph(self) -> Tensor:
        """φ (M, ..., E) at all positions of each row, with the graph of the forward."""
        assert self._last is not None
        features = without_inference(self._last)
        return torch.cat([features, features.new_ones(*features.shape[:-1], 1)], dim=-1) if self._bias else features
