"""RegVar in your own training loop: a regularizer in the loss, and the variance from both networks."""

from __future__ import annotations

import warnings
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from estimators.errors import ModelError, OptionError
from estimators.estimator.base import UncertaintyEstimator
from estimators.estimator.options import CommonOptions, inherits_options
from estimators.likelihoods import Likelihood
from estimators.models.checks import check_model
from estimators.models.network import Network
from estimators.numerics.pytrees import PyTree
from estimators.objective.objective import Objective
from estimators.option_checks import checked_number
from estimators.persistence.weight_checksum import check_unchanged, weight_checksum
from estimators.regvar.solvers.nonlinearity import nonlinearity

__all__ = ["RegularizedPair", "mean_absolute_penalty"]

_MAX_NONLINEARITY = 0.5
"""Nonlinearity ratio above which `fit` warns: the difference of the networks is then no linear response."""


def mean_absolute_penalty(outputs: Tensor, *, lam: float, n_data: int, mask: Tensor | None = None) -> Tensor:
    """Return (λ/N) · mean |f|, to add to the *mean* loss of a minibatch (McInerney & Kallus 2025, Figure 2).

    A mean loss with λ/N is the sum L with λ: the response does not depend on N or on the batch size. The mean loss must
    contain the prior too, ½ δ/N ‖θ‖².

    Args:
        outputs: (B, C), or any shape (..., C) such as token logits (B, T, C).
        lam: λ > 0, the same as in `RegularizedPair`.
        n_data: N, the training rows (not batches) that the mean loss is a mean over; for tokens, their number.
        mask: (...), true for entries that count; None counts all. Mask padding.

    Returns:
        A scalar.

    Raises:
        OptionError: lam <= 0, n_data < 1, or a mask of another shape.
    """
    _checked_lam(lam)
    if n_data < 1:
        raise OptionError("n_data >= 1", received=repr(n_data), remedy="the number of training rows, len(dataset).")
    if mask is None:
        return _AbsoluteSum.apply(outputs, lam / n_data / outputs.numel())  # type: ignore[no-any-return]
    size = outputs.abs().mean(-1)
    if mask.shape != size.shape:
        raise OptionError(
            f"a mask of shape {tuple(size.shape)}, that of the outputs without their last dimension",
            received=f"shape {tuple(mask.shape)}",
            remedy="the attention mask, shifted as the logits are.",
        )
    chosen = mask.to(size)
    return lam / n_data * (size * chosen).sum() / chosen.sum().clamp_min(1)


class _AbsoluteSum(torch.autograd.Function):
    """Return scale · Σ|f|. The backward pass keeps no tensor of the size of the outputs and allocates one."""

    @staticmethod
    def forward(outputs: Tensor, scale: float) -> Tensor:
        return scale * outputs.abs().sum()  # vector_norm has no such tensor, and is 2 % off for 3·10⁷ numbers

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:  # noqa: ANN401, ARG004
        ctx.save_for_backward(inputs[0])
        ctx.scale = inputs[1]

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        (outputs,) = ctx.saved_tensors
        return torch.sign(outputs).mul_(ctx.scale * slope), None


class RegularizedPair(UncertaintyEstimator):
    """Estimator |f(x; θ_λ) − f(x; θ̂)| / λ from a network and its continuation with `mean_absolute_penalty`.

    This is the amortised form of McInerney & Kallus 2025, Figure 2. It is NOT the variance, but a sign-weighted mean
    covariance with the training rows; see `MeanAbsolute`, of which this is the refit at finite λ. A query costs two
    forward passes. Start the second training at θ̂: networks from two random initialisations differ by more than the
    response. After `fit`, `nonlinearity_` is ‖Δf − JΔθ‖/‖JΔθ‖ over one batch; `fit` warns if it exceeds 0.5.

    Args:
        model: the network trained without the penalty.
        regularized: a network of the same architecture, trained further with the penalty, in eval mode.
        likelihood: a likelihood, or the name of one such as "regression".
        lam: the λ of the penalty.
        prior_precision: δ > 0 of the training, a number or a mapping from globs of parameter names to numbers.
        prior_mean: the mean of the prior.
        subset_of_weights: the weights over which `nonlinearity_` is measured.

    Raises:
        OptionError: an option is out of its range.

    Example:
        >>> import copy, torch
        >>> model = nn.Linear(2, 1).eval()
        >>> loader = [(torch.randn(8, 2), torch.randn(8, 1))]
        >>> regularized = copy.deepcopy(model)
        >>> with torch.no_grad():
        ...     _ = regularized.bias.add_(-0.01)  # stands for the second training
        >>> pair = RegularizedPair(model, regularized, "regression", lam=0.1).fit(loader)
        >>> pair.variance(torch.randn(3, 2)).shape
        torch.Size([3, 1])
    """

    @inherits_options(UncertaintyEstimator, CommonOptions)
    def __init__(
        self,
        model: nn.Module,
        regularized: nn.Module,
        likelihood: str | Likelihood,
        *,
        lam: float,
        **options: Unpack[CommonOptions],
    ) -> None:
        super().__init__(model, likelihood, **options)
        self.regularized, self.lam = regularized, _checked_lam(lam)

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:  # noqa: ARG002
        self._check_same_architecture()
        check_model(self.regularized)
        self.regularized_network_ = Network(self.regularized, list(objective.network.subset.shapes))
        self.regularized_checksum_ = weight_checksum(self.regularized, self.regularized_network_.params)
        displacement = (self.regularized_network_.theta - objective.theta) / self.lam
        self.nonlinearity_ = nonlinearity(objective, displacement[None], self.lam)
        if not self.nonlinearity_ <= _MAX_NONLINEARITY:
            warnings.warn(
                f"the two networks are not in one linear region: ‖Δf − JΔθ‖ is {self.nonlinearity_:.2g} of ‖JΔθ‖ "
                f"at lam={self.lam:g}. Start the regularized training at the trained network, or use a smaller lam.",
                stacklevel=3,
            )

    def _variance(self, x: PyTree) -> Tensor:
        return self._variance_with_outputs(x, self.network_.outputs(x))

    def _checked_outputs(self, x: PyTree) -> Tensor:
        self._check_fitted()
        check_unchanged(self.regularized, self.regularized_checksum_, self.regularized_network_.params)
        return super()._checked_outputs(x)

    def _variance_with_outputs(self, x: PyTree, f: Tensor) -> Tensor:
        return (self.regularized_network_.outputs(x) - f.flatten(1)).abs_().div_(self.lam)

    def _check_same_architecture(self) -> None:
        ours, theirs = (
            {name: (p.shape, p.dtype, p.device) for name, p in model.named_parameters()}
            for model in (self.model, self.regularized)
        )
        if ours != theirs:
            odd = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
            raise ModelError(
                "two networks with the same parameters",
                received=f"a difference in {', '.join(odd[:4])}",
                remedy="train a copy.deepcopy of the model with the penalty.",
            )


def _checked_lam(lam: float) -> float:
    return float(checked_number("lam", lam, above=0, remedy="0.1, the published value, or less."))
