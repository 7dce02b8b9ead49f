"""Samplers of the posterior itself, against which approximations are measured."""

from estimators.sampling.diagnostics import ConvergenceCriteria, NoiseFloor, RowDiagnostics, SamplerDiagnostics
from estimators.sampling.reference import ReferencePosterior

__all__ = ["ConvergenceCriteria", "NoiseFloor", "ReferencePosterior", "RowDiagnostics", "SamplerDiagnostics"]
