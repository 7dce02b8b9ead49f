"""The last linear layer as a function of its features: what the closed forms and the exact block of RegVar share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from estimators.errors import EstimatorError, NoLastLayerError, UnsupportedError
from estimators.likelihoods import Likelihood
from estimators.likelihoods.categorical import Sites
from estimators.models.derivative_routes import FAILURES, short
from estimators.models.last_linear import LastLinear, find_last_linear
from estimators.models.network import Network
from estimators.numerics.dtype import algebra_dtype, to_algebra_dtype
from estimators.numerics.pytrees import PyTree
from estimators.objective.objective import Objective

__all__ = ["LastLayer"]


@dataclass(frozen=True)
class LastLayer:
    """A last layer f = Wφ + b: its features, and its part of θ as a matrix (C, E), E = D, or D + 1 with a bias."""

    network: Network
    layer: LastLinear
    n_outputs: int
    n_features: int

    @classmethod
    def of(cls, network: Network, x: PyTree, *, name: str | None = None) -> LastLayer:
        """The head that produces the outputs on x. Errors: ModelError, UnsupportedError."""
        try:
            with network.pass_counter.calls_of(network.module):
                found = find_last_linear(network.module, x, name=name)
        except EstimatorError:
            raise
        except FAILURES as error:  # a scripted module takes no hooks; a copy may lack what a hook stores
            raise _not_last(name or "?", f"a copy that raises {type(error).__name__}: {short(error)}") from error
        return cls.described(network, asdict(found))

    @classmethod
    def described(cls, network: Network, description: dict[str, str | None]) -> LastLayer:
        """The head of a `description()`."""
        layer = LastLinear(**description)  # type: ignore[arg-type]
        linear = network.module.get_submodule(layer.name)
        assert isinstance(linear, nn.Linear)
        return cls(network, layer, linear.out_features, linear.in_features + (layer.bias is not None))

    def description(self) -> dict[str, str | None]:
        """The layer by its names."""
        return asdict(self.layer)

    def features(self, x: PyTree) -> Tensor:
        """φ (M, E) at θ̂, with a 1 appended where the bias is a parameter."""
        with self.capture_features() as heard:
            f = self.network.shaped_outputs(x)
        self.check(x, f, heard)
        return heard.features

    def check(self, x: PyTree, f: Tensor, heard: FeatureHook) -> None:
        """Whether the layer ends the network at x: f = Wφ + b (B, ..., C) there, and ∂f/∂W = φ.

        Raises:
            NoLastLayerError: outputs that are masked, gated or detached after the layer, or weights used elsewhere.
        """
        weight, bias = self._linear.weight, self._linear.bias
        given = None if heard.inputs is None else heard.inputs.to(weight.dtype)
        expected = None if given is None else torch.nn.functional.linear(given, weight, bias).detach()
        check = self.network.check
        if not check.enabled:
            return
        if expected is None or expected.shape != f.shape:
            raise _not_last(self.layer.name, "outputs that the layer did not make")
        scale = float(f.double().abs().max()) if f.numel() else 0.0
        apart = float((expected.double() - f.double()).abs().max()) if f.numel() else 0.0
        if not apart <= check.tolerance() * scale:
            raise _not_last(self.layer.name, f"rows whose outputs differ from the layer's by {apart:.2g}")
        if not check.due("last layer", x):
            return
        u = check.cotangent(x, f)
        slope = u.flatten(0, -2).T @ heard.at_positions.flatten(0, -2).to(u)  # Σ u φᵀ, (C, E)
        parts = [slope] if self.layer.bias is None else [slope[:, :-1], slope[:, -1]]
        product = torch.cat([part.flatten() for part in parts])
        found = self.network.slope_error(x, u.flatten(1), product, self.layer.parameter_names)
        if not found.within(check.tolerance()):
            raise _not_last(self.layer.name, f"a gradient with respect to its weights that {found}")
        check.seen("last layer", len(f), found.error)

    @property
    def _linear(self) -> nn.Linear:
        linear = self.network.module.get_submodule(self.layer.name)
        assert isinstance(linear, nn.Linear)
        return linear

    @contextmanager
    def capture_features(self) -> Iterator[FeatureHook]:
        """The features of the forwards within."""
        heard = FeatureHook(bias=self.layer.bias is not None)
        hook = self.network.module.get_submodule(self.layer.name).register_forward_pre_hook(heard)
        try:
            yield heard
        finally:
            hook.remove()

    def to_matrix(self, theta: Tensor) -> Tensor:
        """The layer's entries of vectors (..., P) as (..., C, E)."""
        places = self.network.subset.slices
        weight: Tensor = theta[..., places[self.layer.weight]].unflatten(-1, (self.n_outputs, -1))
        if self.layer.bias is None:
            return weight
        return torch.cat([weight, theta[..., places[self.layer.bias], None]], dim=-1)

    def to_theta(self, matrix: Tensor) -> Tensor:
        """(..., C, E) -> (..., P), zero outside the layer."""
        places = self.network.subset.slices
        theta = matrix.new_zeros(*matrix.shape[:-2], self.network.n_parameters)
        weight = matrix if self.layer.bias is None else matrix[..., :-1]
        theta[..., places[self.layer.weight]] = weight.flatten(-2)
        if self.layer.bias is not None:
            theta[..., places[self.layer.bias]] = matrix[..., -1]
        return theta

    @property
    def mask(self) -> Tensor:
        """(P,) bool: the layer's entries of θ."""
        return self.network.subset.mask(self.layer.parameter_names).to(self.network.theta.device)

    def full_curvature(self, objective: Objective) -> Tensor:
        """Σₙ Λₙ ⊗ φₙφₙᵀ, (C, E, C, E), in `algebra_dtype`; n counts places, where a row has several."""
        c, e = self.n_outputs, self.n_features
        total = objective.theta.new_zeros(c * c, e * e, dtype=algebra_dtype(objective.theta.device))
        chunk = max(1, 2**24 // max(e * e, c * c))
        for place in self._places(objective):
            for f, phi in zip(place.f.split(chunk), place.features.split(chunk), strict=True):
                lam = place.likelihood.hessian(f)
                outer = phi[:, :, None] * phi[:, None, :]
                total.addmm_(lam.reshape(-1, c * c).T, outer.reshape(-1, e * e))
        return total.reshape(c, c, e, e).permute(0, 2, 1, 3)

    def kron_factors(self, objective: Objective) -> tuple[Tensor, Tensor]:
        """mean Λ (C, C) and Σ φφᵀ (E, E) in `algebra_dtype`, over places where a row has several."""
        theta, n = to_algebra_dtype(objective.theta[:0]), 0
        mean_hessian = theta.new_zeros(self.n_outputs, self.n_outputs)
        gram = theta.new_zeros(self.n_features, self.n_features)
        for place in self._places(objective):
            gram += place.features.T @ place.features
            mean_hessian += place.likelihood.hessian_sum(place.f)
            n += len(place.f)
        return mean_hessian / n, gram

    def diagonal(self, objective: Objective) -> Tensor:
        """Σₙ Λₙ,cc φₙₑ², (C, E), in `algebra_dtype`."""
        total = to_algebra_dtype(objective.theta[:0]).new_zeros(self.n_outputs, self.n_features)
        for place in self._places(objective):
            total += place.likelihood.hessian_diagonal(place.f).T @ place.features.square()
        return total

    def _places(self, objective: Objective) -> Iterator[PositionBatch]:
        """Batch by batch, the places that have a label: of a row without several, the row. In `algebra_dtype`."""
        for batch in objective.batches:
            with self.capture_features() as heard:
                shaped = self.network.shaped_outputs(batch.x)
            self.check(batch.x, shaped, heard)
            f = to_algebra_dtype(shaped.flatten(0, -2))
            features, likelihood = (
                to_algebra_dtype(heard.at_positions.flatten(0, -2)),
                objective.likelihood.given(batch.y),
            )
            if not isinstance(likelihood, Sites):
                yield PositionBatch(likelihood, f, features)
                continue
            if likelihood.classes_first:
                raise UnsupportedError(
                    "classes along the last dimension, where a linear layer has its outputs",
                    received="a likelihood with class_dim=1",
                    remedy='subset_of_weights="all", or class_dim=-1.',
                )
            kept = likelihood.kept.flatten()
            yield PositionBatch(likelihood.site, f[kept], features[kept])


def _not_last(name: str, received: str) -> NoLastLayerError:
    return NoLastLayerError(
        f"a last layer {name!r} that ends the network at every row, and whose weights are used nowhere else",
        received=received,
        remedy='subset_of_weights="all" with LinearizedLaplace or RegVar, or move what comes after the layer out of '
        "the network.",
    )


@dataclass(frozen=True)
class PositionBatch:
    """Where the layer was used: the likelihood of one place, outputs (R, C) and features (R, E)."""

    likelihood: Likelihood
    f: Tensor
    features: Tensor


class FeatureHook:
    """A forward hook that keeps what the layer was last given."""

    def __init__(self, *, bias: bool) -> None:
        self._bias = bias
        self._last: Tensor | None = None
        self._calls = 0

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:  # noqa: ARG002
        self._last = arguments[0].clone()
        self._calls += 1

    @property
    def inputs(self) -> Tensor | None:
        """What the layer was given (M, ..., D); None where it was not called, or several times."""
        if self._calls != 1 or self._last is None:
            return None
        return self._last.detach().clone() if self._last.is_inference() else self._last.detach()

    @property
    def features(self) -> Tensor:
        """φ (M, E), with a 1 appended where the bias is a parameter. Errors: UnsupportedError for another shape."""
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
        """φ (M, ..., E) of a layer that is used at several places of a row, likewise."""
        assert self._last is not None
        features = self._last.detach().clone() if self._last.is_inference() else self._last.detach()
        return torch.cat([features, features.new_ones(*features.shape[:-1], 1)], dim=-1) if self._bias else features
