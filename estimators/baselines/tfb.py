"""Training-free Bayesianization: a Gaussian over LoRA adapters whose width a tolerance of the loss determines."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from estimators.errors import ConvergenceError, ModelError
from estimators.estimator.base import UncertaintyEstimator
from estimators.estimator.members import WeightMembersEstimator
from estimators.estimator.options import CommonOptions, inherits_options
from estimators.likelihoods import Likelihood
from estimators.models.derivative_routes import BY_IDENTITY
from estimators.models.subsets import Subset
from estimators.numerics.dtype import algebra_dtype
from estimators.objective.objective import Objective
from estimators.option_checks import checked_integer, checked_number, checked_seed
from estimators.persistence.state import Learned
from estimators.runtime.module_wrappers import plain_names
from estimators.runtime.rng import member_seeds

__all__ = ["TFB", "adapter_pairs"]

_DOWN = re.compile(r"(^|(?<=\.))lora_(embedding_)?A(?=$|\.)")
"""The first matrix of an adapter in a parameter's name: peft's `lora_A.default.weight`, or `lora_A` of loralib."""
_START = 1e-2
"""σ_q at which the search begins, in units of the adapted weights; the paper searches from .001 to .2."""
_DOUBLINGS = 40
"""Doublings or halvings of σ_q before the search ends with an error: the loss does not depend on the adapters."""
_PRECISION = 1.02
"""Ratio of the bounds of σ_q at which the bisection ends."""
_CUTOFF = 1e-6
"""Singular values of B below this share of the largest one are zero, in float64; the adapter has a lower rank then."""


class TFB(WeightMembersEstimator):
    """Training-free Bayesianization of LoRA adapters (Shi et al. 2024, arXiv 2412.05723, equations 5 to 8).

        W = W₀ + s B A,   B = U diag(d) Vᵀ,   A_s = A + V diag(σ_q / d) E,   E_ij ~ N(0, 1),   s = 1 ... S

    A, the first matrix of each adapter, is perturbed so that W has the covariance σ_q² s² (U Uᵀ) ⊗ I: isotropic within
    the columns that the adapter spans. B, the head and all frozen weights stay. σ_q is the only number, and it is the
    largest one at which the loss of the posterior predictive distribution on the training rows,

        ℓ(σ) = −(1/N) Σₙ log (1/S) Σ_s p(yₙ | f(xₙ; θ_s)),     |ℓ(σ_q) − ℓ(0)| <= tolerance · ℓ(0),

    changes by at most the tolerance: found by doubling and bisection, with the same E at every σ, by forward passes
    alone. In regression ℓ is without its constant, so that it is zero for a perfect fit.

    The prior does not matter: no option of this class but the tolerance sets the width. Two differences from the paper:
    the data are the rows and labels of the fit, where the paper may use unlabelled rows with the labels that the
    network predicts; and directions that B does not have, if its rank is lower, are not perturbed.

    Args:
        model: the trained network, in eval mode; it is not changed. Its adapters are found by their names, `lora_A` and
            `lora_B`, as peft has them.
        likelihood: "regression", "classification" or "binary", or a `Likelihood` with its parameters.
        prior_precision: δ of the Gaussian prior on the weights, as for other estimators; it has no influence.
        prior_mean: θ₀, the mean of the prior; it has no influence.
        subset_of_weights: "all", or names and patterns of the parameters that are uncertain; those that are the first
            matrix of an adapter are perturbed.
        tolerance: the largest relative change of the loss. .01 is the default of the authors' code.
        n_samples: the number S >= 2 of networks, for the search and for predictions; 10 in the paper.
        seed: the seed of E.

    Attributes:
        sigma_q_: σ_q, in units of the weights of B A.
        loss_change_: |ℓ(σ_q) − ℓ(0)| / ℓ(0).
        fit_report_: the passes of the fit.

    Raises:
        OptionError: for an invalid option. `fit` raises ModelError if no adapter is among the chosen weights, or if B
            is zero, as before training; and ConvergenceError if the loss does not depend on σ.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> class Adapted(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.base = nn.Linear(3, 2).requires_grad_(False)
        ...         self.lora_A, self.lora_B = nn.Linear(3, 1, bias=False), nn.Linear(1, 2, bias=False)
        ...     def forward(self, x):
        ...         return self.base(x) + self.lora_B(self.lora_A(x))
        >>> estimator = TFB(Adapted().eval(), "classification", n_samples=4)
        >>> estimator.fit([(torch.randn(20, 3), torch.randint(2, (20,)))]).variance(torch.randn(5, 3)).shape
        torch.Size([5, 2])
    """

    @inherits_options(UncertaintyEstimator, CommonOptions)
    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        tolerance: float = 0.01,
        n_samples: int = 10,
        seed: int = 0,
        **options: Unpack[CommonOptions],
    ) -> None:
        super().__init__(model, likelihood, **options)
        self.tolerance = checked_number("tolerance", tolerance, above=0, remedy="0.01.")
        self.n_samples, self.seed = checked_integer("n_samples", n_samples, at_least=2), checked_seed(seed)

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:  # noqa: ARG002
        objective.network.routes.swap = BY_IDENTITY  # replaces every use of a weight, for all inputs
        objective.check_displaced()
        self._directions = _directions(objective)
        with objective.network.pass_counter.phase("search"):
            at_mode = self._loss(objective, 0.0)
            scale = abs(at_mode) or torch.finfo(objective.theta.dtype).tiny

            def change(sigma: float) -> float:
                found = abs(self._loss(objective, sigma) - at_mode) / scale
                return found if math.isfinite(found) else math.inf  # weights so large that outputs overflow

            self.sigma_q_ = _largest(change, self.tolerance)
            self.loss_change_ = change(self.sigma_q_)

    def _loss(self, objective: Objective, sigma: float) -> float:
        """Return ℓ(σ) in nats per row."""
        total = objective.theta.new_zeros((), dtype=algebra_dtype(objective.theta.device))
        for batch in objective.batches:
            logs = []
            for theta in self._perturbed(objective.theta, sigma) if sigma else [objective.theta]:
                with torch.no_grad():
                    f = objective.network(theta, batch.x)
                logs.append(-objective.likelihood.nll(f, batch.y))
            mixture = torch.stack(logs).to(total.dtype).logsumexp(0) - math.log(len(logs))
            if objective.likelihood.kind == "regression":  # without the constant of the normal density
                mixture = mixture + objective.likelihood.nll(batch.y.flatten(1), batch.y)
            total -= mixture.sum()
        return float(total) / objective.batches.n_data

    def _perturbed(self, theta: Tensor, sigma: float) -> Iterator[Tensor]:
        """Yield θ_s, (P,) each, s = 1 ... S, the same in every call and on every device."""
        for seed in member_seeds(self.seed, self.n_samples):
            generator = torch.Generator().manual_seed(seed)
            moved = theta.clone()
            for part in self._directions:
                moved[part.entries] += sigma * part.sample(generator).to(moved)
            yield moved

    def _member_weights(self) -> Iterator[Tensor]:
        return self._perturbed(self.theta_, self.sigma_q_)

    def _get_fit_state(self) -> Learned:
        return {}, {"sigma_q": self.sigma_q_, "loss_change": self.loss_change_}

    def _set_fit_state(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:  # noqa: ARG002
        objective.network.routes.swap = BY_IDENTITY
        self._directions = _directions(objective)
        self.sigma_q_, self.loss_change_ = learned["sigma_q"], learned["loss_change"]


@dataclass(frozen=True)
class _Directions:
    """V diag(1/d) of one adapter, (r, rank of B), and the entries of θ that its matrix A (r, K) has."""

    entries: slice
    root: Tensor
    n_columns: int

    def sample(self, generator: torch.Generator) -> Tensor:
        """Return V diag(1/d) E, (r K,), in float64."""
        noise = torch.randn(self.root.shape[1], self.n_columns, generator=generator, dtype=torch.float64)
        return (self.root @ noise).flatten()


def adapter_pairs(subset: Subset, names: Iterator[str] | list[str]) -> dict[str, str]:
    """Return the name of B of every adapter whose A is among the chosen parameters, by the name of A.

    Args:
        subset: the chosen parameters.
        names: of all parameters of the network.

    Returns:
        Names such as {"0.lora_A.default.weight": "0.lora_B.default.weight"}.
    """
    known, pairs = set(names), {}
    for name in subset.shapes:
        other = _DOWN.sub(lambda match: match.group(0)[:-1] + "B", name)
        if other != name and other in known:
            pairs[name] = other
    return pairs


def _directions(objective: Objective) -> list[_Directions]:
    """Return the directions of every adapter. Raises ModelError without one, and if B is zero."""
    module, subset = objective.network.module, objective.network.subset
    parameters = dict(module.named_parameters())
    plain = {plain: parameters[own].detach() for own, plain in plain_names(module, parameters)}
    pairs = adapter_pairs(subset, list(plain))
    if not pairs:
        raise ModelError(
            "a network with LoRA adapters, trainable parameters lora_A with lora_B beside them",
            received=f"none among {len(subset.shapes)} chosen parameters",
            remedy="peft's get_peft_model, and requires_grad_(True) for the adapters of a loaded model.",
        )
    found = []
    for name, other in pairs.items():
        b = plain[other].cpu().double()
        _, d, vh = torch.linalg.svd(b.reshape(len(b), -1), full_matrices=False)
        kept = d > _CUTOFF * d[0]
        if not bool(kept.any()):
            raise ModelError(
                "trained adapters, whose second matrix is not zero",
                received=f"zeros in {other!r}",
                remedy="train the adapters first; before that they change nothing.",
            )
        root = vh[kept].T / d[kept]
        found.append(_Directions(subset.slices[name], root, subset.shapes[name].numel() // root.shape[0]))
    return found


def _largest(change: Callable[[float], float], tolerance: float) -> float:
    """Return the largest σ with a change of at most the tolerance, up to 2 %, if the change grows with σ."""
    sigma = _START
    grows = change(sigma) <= tolerance
    for _ in range(_DOUBLINGS):
        following = 2 * sigma if grows else sigma / 2
        if (change(following) <= tolerance) != grows:
            low, high = (sigma, following) if grows else (following, sigma)
            break
        sigma = following
    else:
        raise ConvergenceError(
            "a loss that depends on the adapters",
            received=f"a change {'below' if grows else 'above'} the tolerance of {tolerance:g} at σ_q = {sigma:.1e}",
            remedy="train the adapters; or another tolerance.",
        )
    while high / low > _PRECISION:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if change(middle) <= tolerance else (low, middle)
    return low
