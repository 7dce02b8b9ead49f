"""Predictive variance of trained PyTorch networks: RegVar, exact linearized Laplace, last-layer Laplace, baselines."""

from estimators.base import Prediction, UncertaintyEstimator
from estimators.laplace import LinearizedLaplace
from estimators.last_layer import LastLayerLaplace
from estimators.likelihoods import Bernoulli, Categorical, Gaussian

__all__ = [
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "LastLayerLaplace",
    "LinearizedLaplace",
    "Prediction",
    "UncertaintyEstimator",
]
