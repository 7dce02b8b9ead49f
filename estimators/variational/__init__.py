"""Variational inference: Gaussians over weights that maximise the evidence lower bound (ELBO)."""

from estimators.variational.ivon import IVON
from estimators.variational.mean_field import MeanFieldEstimator, MeanFieldVI
from estimators.variational.vbll import VBLL

__all__ = ["IVON", "VBLL", "MeanFieldEstimator", "MeanFieldVI"]
