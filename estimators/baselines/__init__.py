"""Baseline methods, one per file."""

from estimators.baselines.batch_ensemble import BatchEnsemble
from estimators.baselines.ddu import DDU
from estimators.baselines.dropout import MCDropout
from estimators.baselines.ensemble import DeepEnsemble
from estimators.baselines.gaussian_process import GaussianProcess
from estimators.baselines.gradient_norm import GradientNorm
from estimators.baselines.laplace_torch import LaplaceTorch
from estimators.baselines.lora_ensemble import LoRAEnsemble
from estimators.baselines.map import MAP
from estimators.baselines.mixture import Mixture, RetrainedMixture
from estimators.baselines.multi_head import MultiHeadEnsemble
from estimators.baselines.ntk_gaussian_process import NTKGaussianProcess
from estimators.baselines.sngp import SNGP
from estimators.baselines.swag import SWAG
from estimators.baselines.temperature import TemperatureScaling
from estimators.baselines.tfb import TFB
from estimators.estimator.members import MembersEstimator
from estimators.laplace.subnetwork import SubnetworkLaplace

__all__ = [
    "DDU",
    "MAP",
    "SNGP",
    "SWAG",
    "TFB",
    "BatchEnsemble",
    "DeepEnsemble",
    "GaussianProcess",
    "GradientNorm",
    "LaplaceTorch",
    "LoRAEnsemble",
    "MCDropout",
    "MembersEstimator",
    "Mixture",
    "MultiHeadEnsemble",
    "NTKGaussianProcess",
    "RetrainedMixture",
    "SubnetworkLaplace",
    "TemperatureScaling",
]
