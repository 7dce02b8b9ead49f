"""Small posteriors for the tests of the samplers, and criteria that a short run meets."""

import math

import numpy as np
import torch
from torch import nn
from torch.func import grad_and_value, vmap

from estimators import Gaussian, ReferencePosterior
from estimators.objective.objective import Objective
from estimators.sampling import ConvergenceCriteria
from estimators.sampling.potential import FullPotential, training_batches

LOOSE = ConvergenceCriteria(
    max_r_hat=1.2,
    min_bulk_ess=100,
    min_squares_ess=50,
    max_total_variation=0.1,
    max_query_total_variation=0.2,
    max_acceptance=1.0,
)
GROUPS = {"*bias": 0.9, "*": 3.1}
PRIOR_MEAN = {"0.weight": 0.3, "*": -0.2}


def rows(n=17, inputs=2, outputs=2, seed=0, dtype=torch.float64):
    """Batches of 6 rows, which do not divide n, of a regression."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, inputs, generator=generator, dtype=torch.float64)
    y = x.sum(1, keepdim=True).sin() + 0.5 * torch.randn(n, outputs, generator=generator, dtype=torch.float64)
    return list(zip(x.to(dtype).split(6), y.to(dtype).split(6), strict=True))


def queries(n=6, inputs=2, seed=5):
    return torch.randn(n, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(inputs=2, hidden=3, outputs=2, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs)).double().eval()


def short(model=None, likelihood=None, **options):
    """A posterior whose fit takes a second or two."""
    defaults = {"prior_precision": 2.3, "n_chains": 8, "starts": "prior", "criteria": LOOSE, "n_draws": 2000}
    likelihood = Gaussian(0.6) if likelihood is None else likelihood
    return ReferencePosterior(network() if model is None else model, likelihood, **{**defaults, **options})


def objective_of(estimator, loader) -> Objective:
    return estimator._build_objective(loader)


def potential_of(estimator, loader) -> FullPotential:
    objective = objective_of(estimator, loader)
    return FullPotential(objective, training_batches(objective))


def z_rms(first, other, size, other_size=math.inf):
    """The root mean square of the z-scores between means and variances of two sets of independent draws.

    Each is (mean, variance, sample size of means, of variances).
    """
    (m, v), (n, w) = first, other
    (a, b), (c, d) = size, other_size
    means = (m - n) / (v / a + w / c).sqrt()
    variances = (v - w) / (2 * v.square() / b + 2 * w.square() / d).sqrt()
    return float(torch.cat([means.flatten(), variances.flatten()]).square().mean().sqrt())


class Replications:
    """Gradients of many posteriors at a time, one for each chain: their data are drawn from the prior of the model.

    Simulation-based calibration (Talts et al. 2018): parameters from the prior, data from the network, one chain each.
    """

    def __init__(self, model, likelihood, x, *, n, delta, seed=0):
        estimator = ReferencePosterior(model, likelihood, prior_precision=delta)
        kind = likelihood.kind
        y = torch.zeros(len(x), 2, dtype=x.dtype) if kind == "regression" else torch.zeros(len(x), dtype=torch.long)
        objective = objective_of(estimator, [(x, y)])
        self.potential = FullPotential(objective, training_batches(objective))
        generator = torch.Generator().manual_seed(seed)
        p = self.potential.n_dims
        self.truth = torch.randn(n, p, generator=generator, dtype=x.dtype)
        self.starts = torch.randn(n, p, generator=generator, dtype=x.dtype)
        f = self.outputs(self.truth, x)
        if kind == "regression":
            self.y = f + likelihood.sigma_noise * torch.randn(f.shape, generator=generator, dtype=x.dtype)
        else:
            gumbel = -torch.rand(f.shape, generator=generator, dtype=x.dtype).log().neg().log()
            self.y = (f + gumbel).argmax(-1)
        batch = self.potential.batches[0]
        network = objective.network

        def energy(z, y):
            theta = self.potential.to_weights(z)
            return likelihood.nll(network(theta, batch.x), y).sum() + objective.prior.energy(theta)

        self._gradient = vmap(grad_and_value(energy))

    def __call__(self, z):
        gradient, energy = self._gradient(z, self.y)
        return energy.detach(), gradient.detach()

    def outputs(self, z, x):
        """f (n, M, C) of coordinates z (n, P)."""
        network = self.potential.objective.network
        with torch.no_grad():
            return vmap(lambda z: network(self.potential.to_weights(z), x))(z)


def ranks_of(truth, draws):
    """The rank of the truth (n, Q) among draws (L, n, Q), in (0, 1) with ties broken by a uniform shift."""
    below = (draws < truth).double().sum(0)
    shift = torch.rand(below.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return ((below + shift) / (len(draws) + 1)).numpy()


def binomial_half_width(n, level=0.9):
    """Three standard errors of a coverage."""
    return 3 * np.sqrt(level * (1 - level) / n)
