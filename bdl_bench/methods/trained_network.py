"""The trained network alone, with which every other method is compared."""

from __future__ import annotations

from bdl_bench.methods.registry import BASELINE, Method, preset
from bdl_bench.problem.problem import Problem
from estimators import UncertaintyEstimator
from estimators.baselines import GradientNorm, TemperatureScaling
from estimators.baselines.map import MAP


def _temperature(problem: Problem, seed: int) -> UncertaintyEstimator:  # noqa: ARG001
    return TemperatureScaling(
        problem.model, problem.likelihood, prior_precision=problem.prior_precision, validation=problem.validation
    )


PRESETS = [
    Method(BASELINE, "the trained network alone; its epistemic variance is zero", preset(MAP), default=True),
    Method(
        "temperature-scaling", "the trained network at the softmax temperature of the validation rows", _temperature
    ),
    Method("gradient-norm", "squared norm of the gradient of each output: RegVar with A = I", preset(GradientNorm)),
]
