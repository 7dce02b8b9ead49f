"""Ensembles whose members share most of the network, for language models and other large networks."""

from __future__ import annotations

from bdl_bench.methods.registry import PRIOR, Method, preset
from bdl_bench.problem.problem import Problem
from estimators import UncertaintyEstimator
from estimators.baselines import LoRAEnsemble, MultiHeadEnsemble
from estimators.errors import UnsupportedError

_MEMBERS = 5
"""Sets of adapters, as many as a deep ensemble has networks."""


def _lora(problem: Problem, seed: int) -> UncertaintyEstimator:
    if problem.recipe is None:
        raise UnsupportedError(
            "a problem with a recipe, since lora-ensemble trains its own adapters",
            received="one without",
            remedy="pass recipe= to Problem.",
        )
    if all(p.requires_grad for p in problem.model.parameters()):
        raise UnsupportedError(
            "a network with frozen weights and adapters",
            received="one without frozen weights",
            remedy="the method ensemble.",
        )
    return preset(LoRAEnsemble, seeded=True, n_members=_MEMBERS, recipe=problem.recipe)(problem, seed)


PRESETS = [
    Method(
        "multihead-ensemble",
        "20 last layers on the trained features, each with its own prior sample and resampled training set",
        preset(MultiHeadEnsemble, seeded=True),
        tuned_option=PRIOR,
    ),
    Method("lora-ensemble", f"{_MEMBERS} sets of LoRA adapters, each trained from its own initialisation", _lora),
]
