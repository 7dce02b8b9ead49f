"""Samplers of the posterior over weights: SGLD, SGHMC, and ensembles of microcanonical Langevin chains."""

from __future__ import annotations

from typing import Any

from bdl_bench.methods.registry import Method, check_recipe, preset
from bdl_bench.problem.problem import ENSEMBLE_SIZE, Problem
from estimators import UncertaintyEstimator
from estimators.sampling import SGHMC, SGLD, CyclicalSGHMC, MicrocanonicalLangevin

__all__ = ["PRESETS"]


def _mile(problem: Problem, seed: int) -> UncertaintyEstimator:
    options: dict[str, Any] = {"members": problem.trained_members}
    if problem.members is None:
        check_recipe("mile", problem)
        options = {"make_model": problem.make_model, "recipe": problem.recipe, "n_chains": ENSEMBLE_SIZE}
    return preset(MicrocanonicalLangevin, seeded=True, **options)(problem, seed)


PRESETS = [
    Method(
        "sgld", "stochastic gradient Langevin dynamics: 4 chains from the trained weights", preset(SGLD, seeded=True)
    ),
    Method(
        "sghmc",
        "stochastic gradient Hamiltonian Monte Carlo: 4 chains from the trained weights",
        preset(SGHMC, seeded=True),
    ),
    Method(
        "cyclical-sghmc",
        "SGHMC with a cyclical step size: 4 chains from the trained weights, 4 cycles",
        preset(CyclicalSGHMC, seeded=True),
    ),
    Method(
        "mile",
        f"MILE: microcanonical Langevin chains at {ENSEMBLE_SIZE} networks trained from different initialisations",
        _mile,
    ),
]
