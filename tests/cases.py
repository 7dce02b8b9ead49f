"""Cases of the verification, and estimators fitted to them."""

import torch
from torch import nn
from verification_cases import all_cases, pairwise_cover

from bdl_bench.verify.lambda_sweep import relative_error

__all__ = ["all_cases", "fitted", "layer_norm_network", "pairwise_cover", "relative_error", "singular_cases"]


def fitted(kind, case, **options):
    """An estimator with a curvature, fitted to the case's ragged batches."""
    problem = case.problem
    return kind(
        problem.model,
        problem.likelihood,
        prior_precision=problem.prior_precision,
        subset_of_weights=case.subset_of_weights,
        curvature=case.curvature,
        **options,
    ).fit(problem.batches)


def singular_cases():
    """Attention with query and key among the weights at stationary points: the exact Hessian has no inverse."""
    return [case for case in all_cases() if case.curvature == "hessian" and case.singular_by_symmetry]


def layer_norm_network():
    """A LayerNorm between two linear layers: where torch.func.hessian is wrong."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)).double().eval()
