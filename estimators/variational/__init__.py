"""Variational inference: Gaussians over weights that maximise the evidence lower bound (ELBO)."""

from estimators.variational.mean_field import MeanFieldVI

__all__ = ["MeanFieldVI"]
