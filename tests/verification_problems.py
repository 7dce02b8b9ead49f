"""Small real problems in float64 on which everything dense is cheap: architectures × likelihoods × ends of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from scipy.optimize import OptimizeResult, minimize
from torch import Tensor
from torch.func import grad
from verification_networks import INPUT_SHAPES, NETWORKS

from bdl_bench.verify.case import VerificationCase, names_of
from bdl_bench.verify.reference import DenseReference
from estimators.data.batch import Batch
from estimators.data.training_data import TrainingData
from estimators.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from estimators.runtime.rng import seeded
from estimators.training.training import Recipe, fit_weights

__all__ = ["ARCHITECTURES", "LIKELIHOODS", "TRAININGS", "test_problem"]

ARCHITECTURES = tuple(NETWORKS)
LIKELIHOODS: dict[str, Callable[[], Likelihood]] = {
    "regression": lambda: Gaussian(sigma_noise=0.8),
    "classification": Categorical,
    "binary": Bernoulli,
}
TRAININGS = ("converged", "early", "minibatch", "retuned")
_EARLY = 1.2
_ROWS, _LOADED, _BATCH, _OUTPUTS = 26, 15, 7, {"regression": 2, "classification": 3, "binary": 2}


@cache
def test_problem(architecture: str, likelihood: str, training: str, seed: int, delta: float) -> VerificationCase:
    """The problem, trained from its seed.

    "converged": to a gradient of about 1e-12. "early": stopped at a relative gradient of about one. "minibatch": by
    Adam at a constant rate, which ends near a stationary point and not at one. "retuned": converged for a quarter of δ,
    which is then raised as a search after training would. That leaves a relative gradient of 0.75.
    """
    with seeded(seed):
        model = NETWORKS[architecture](_OUTPUTS[likelihood]).double().eval()
        x = torch.randn(_ROWS, *INPUT_SHAPES[architecture], dtype=torch.float64)
        y = _targets(likelihood, x)
        queries = 1.3 * torch.randn(2, *INPUT_SHAPES[architecture], dtype=torch.float64)
    batches = list(zip(x.split(_LOADED), y.split(_LOADED), strict=True))
    problem = VerificationCase(model, LIKELIHOODS[likelihood](), delta, batches, queries)
    _TRAIN[training](problem)
    return problem


def _targets(likelihood: str, x: Tensor) -> Tensor:
    flat = x.flatten(1)
    signal = torch.stack([torch.sin(2 * flat[:, 0]) + flat[:, 1], flat[:, 2] - flat[:, 0] * flat[:, 1]], dim=1)
    noisy = signal + 0.3 * torch.randn_like(signal)
    if likelihood == "regression":
        return noisy
    if likelihood == "binary":
        return (noisy > 0).to(x.dtype)
    return (noisy[:, 0] > 0).long() + (noisy[:, 1] > 0).long()


def _early(problem: VerificationCase) -> None:
    """Quasi-Newton steps, stopped at the first point whose relative gradient is below 1.2."""

    def stop(intermediate_result: OptimizeResult) -> None:
        _at(problem, intermediate_result.x)
        if problem.relative_gradient() < _EARLY:
            raise StopIteration

    _minimise(_in_one_batch(problem), method="L-BFGS-B", callback=stop, options={"maxiter": 2000, "ftol": 0.0})


def _minibatch(problem: VerificationCase) -> None:
    _descend(problem, epochs=200, lr=0.01, batch_size=_BATCH)


def _retuned(problem: VerificationCase) -> None:
    _converged(replace(problem, prior_precision=_delta(problem) / 4))


def _converged(problem: VerificationCase) -> None:
    """Quasi-Newton, a trust region with exact Hessians, then plain Newton steps against its own stopping rule."""
    whole = _in_one_batch(problem)
    _minimise(whole, method="L-BFGS-B", options={"maxiter": 4000, "maxcor": 40, "ftol": 0.0, "gtol": 1e-5})
    theta = _minimise(
        whole,
        method="trust-exact",
        hess=lambda t: _at(whole, t).precision("hessian").numpy(),
        options={"gtol": 1e-7, "maxiter": 400},
    )
    for _ in range(3):
        there = _at(whole, theta)
        hessian, gradient = there.precision("hessian").numpy(), there.gradient().numpy()
        theta = theta - np.linalg.lstsq(hessian, gradient, rcond=1e-9)[0]  # singular where a symmetry is left
    _at(whole, theta)


def _delta(problem: VerificationCase) -> float:
    assert isinstance(problem.prior_precision, float)
    return problem.prior_precision


def _minimise(problem: VerificationCase, **how: object) -> np.ndarray:
    """The end of a minimiser of scipy on L, from where the network is; the network is left there."""

    def energy_and_gradient(t: np.ndarray) -> tuple[float, np.ndarray]:
        reference, theta = _at(problem, t), torch.from_numpy(t).clone().requires_grad_()
        energy = reference.energy(theta)
        return float(energy.detach()), torch.autograd.grad(energy, theta)[0].numpy()

    start = problem.reference(names_of(problem.model)).theta.numpy()
    found = minimize(energy_and_gradient, start, jac=True, **how)
    end: np.ndarray = found.x
    _at(problem, end)
    return end


def _in_one_batch(problem: VerificationCase) -> VerificationCase:
    x, y = (torch.cat(parts) for parts in zip(*problem.batches, strict=True))
    return replace(problem, batches=[(x, y)])


def _descend(problem: VerificationCase, *, epochs: int, lr: float, batch_size: int = _ROWS) -> None:
    """Adam on the network in eval mode: frozen statistics stay as they are."""
    reference = problem.reference(names_of(problem.model))

    def slope(theta: Tensor, batch: Batch) -> Tensor:
        share = _delta(problem) * len(batch) / _ROWS
        part = replace(reference, batches=[(batch.x, batch.y)], delta=share)
        gradient: Tensor = grad(part.energy)(theta)
        return gradient

    trained = fit_weights(
        reference.theta,
        slope,
        TrainingData.unchecked(problem.batches, keep=True),
        recipe=Recipe(epochs=epochs, batch_size=batch_size, lr=lr, schedule="constant"),
        generator=torch.Generator().manual_seed(0),
    )
    _at(problem, trained.numpy())


def _at(problem: VerificationCase, theta: np.ndarray) -> DenseReference:
    """The reference with the network moved to θ."""
    parameters = list(problem.model.parameters())
    with torch.no_grad():
        for p, part in zip(parameters, torch.from_numpy(theta).split([p.numel() for p in parameters]), strict=True):
            p.copy_(part.view_as(p))
    return problem.reference(names_of(problem.model))


_TRAIN: dict[str, Callable[[VerificationCase], None]] = {
    "converged": _converged,
    "early": _early,
    "minibatch": _minibatch,
    "retuned": _retuned,
}
