"""Ensembles that share most of a network, as language models need them; they run on any network that has such parts."""

from __future__ import annotations

from bdl_bench.methods.registry import PRIOR, Method, preset
from bdl_bench.problem.problem import Problem
from estimators import UncertaintyEstimator
from estimators.baselines import LoRAEnsemble, MultiHeadEnsemble
from estimators.errors import UnsupportedError

_MEMBERS = 5


def _lora(problem: Problem, seed: int) -> UncertaintyEstimator:
    if problem.recipe is None:
        raise UnsupportedError(
            "a problem with a recipe, since lora-ensemble trains adapters of its own",
            received="one without",
            remedy="pass recipe= to Problem.",
        )
    if all(p.requires_grad for p in problem.model.parameters()):
        raise UnsupportedError(
            "a network of which a part is frozen, with adapters beside it",
            received="one that is trained whole",
            remedy="ensemble.",
        )
    return preset(LoRAEnsemble, seeded=True, n_members=_MEMBERS, recipe=problem.recipe)(problem, seed)


PRESETS = [
    Method(
        "multihead-ensemble",
        "20 last layers on the trained body, each with a prior draw and a resampled training set of its own",
        preset(MultiHeadEnsemble, seeded=True),
        axis=PRIOR,
    ),
    Method("lora-ensemble", f"{_MEMBERS} sets of LoRA adapters, each trained from a beginning of its own", _lora),
]
