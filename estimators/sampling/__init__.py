"""Samplers of the posterior over weights: the posterior itself as a reference, and chains with minibatch gradients."""

from estimators.sampling.cyclical_sghmc import CyclicalSGHMC
from estimators.sampling.diagnostics import ConvergenceCriteria, NoiseFloor, RowDiagnostics, SamplerDiagnostics
from estimators.sampling.microcanonical import MicrocanonicalLangevin
from estimators.sampling.reference import ReferencePosterior
from estimators.sampling.sghmc import SGHMC
from estimators.sampling.sgld import SGLD
from estimators.sampling.sgmcmc import SGMCMC

__all__ = [
    "SGHMC",
    "SGLD",
    "SGMCMC",
    "ConvergenceCriteria",
    "CyclicalSGHMC",
    "MicrocanonicalLangevin",
    "NoiseFloor",
    "ReferencePosterior",
    "RowDiagnostics",
    "SamplerDiagnostics",
]
