"""Laplace approximations: linearized over any weights, over the last layer, over a subnetwork."""

from estimators.laplace.last_layer import LastLayerLaplace
from estimators.laplace.linearized import LinearizedLaplace
from estimators.laplace.marginal_likelihood import MarginalLikelihoodFit, maximize_marginal_likelihood
from estimators.laplace.subnetwork import SubnetworkLaplace

__all__ = [
    "LastLayerLaplace",
    "LinearizedLaplace",
    "MarginalLikelihoodFit",
    "SubnetworkLaplace",
    "maximize_marginal_likelihood",
]
