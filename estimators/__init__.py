"""Predictive variance of trained PyTorch networks: RegVar, exact linearized Laplace, last-layer Laplace, baselines."""

from estimators.calibration.conformal import SplitConformal
from estimators.estimator.base import Prediction, UncertaintyEstimator
from estimators.laplace.last_layer import LastLayerLaplace
from estimators.laplace.linearized import LinearizedLaplace
from estimators.likelihoods import Bernoulli, Categorical, Gaussian
from estimators.regvar.estimator import RegVar
from estimators.regvar.regularizers import MeanAbsolute, ParameterProbes, Pointwise, PosteriorDraws, SignedProbes
from estimators.regvar.solvers import FineTune, LinearResponse, NewtonRefit
from estimators.sampling.reference import ReferencePosterior
from estimators.tuning import Tuned, calibrate, optimize_prior_precision, tune

__all__ = [
    "Bernoulli",
    "Categorical",
    "FineTune",
    "Gaussian",
    "LastLayerLaplace",
    "LinearResponse",
    "LinearizedLaplace",
    "MeanAbsolute",
    "NewtonRefit",
    "ParameterProbes",
    "Pointwise",
    "PosteriorDraws",
    "Prediction",
    "ReferencePosterior",
    "RegVar",
    "SignedProbes",
    "SplitConformal",
    "Tuned",
    "UncertaintyEstimator",
    "calibrate",
    "optimize_prior_precision",
    "tune",
]
