"""Samplers of the posterior over weights: chains with minibatch gradients and with the full gradient."""

from estimators.sampling.cyclical_sghmc import CyclicalSGHMC
from estimators.sampling.microcanonical import MicrocanonicalLangevin
from estimators.sampling.sghmc import SGHMC
from estimators.sampling.sgld import SGLD
from estimators.sampling.sgmcmc import SGMCMC

__all__ = ["SGHMC", "SGLD", "SGMCMC", "CyclicalSGHMC", "MicrocanonicalLangevin"]
