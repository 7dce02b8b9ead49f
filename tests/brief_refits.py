"""The preset regvar-finetune with two epochs: for tests of what happens around its refits."""

from dataclasses import replace

from bdl_bench.methods import METHODS
from estimators import FineTune
from estimators.estimator.cloning import clone
from estimators.training import Recipe

NAME = "regvar-finetune"
PRESET = METHODS[NAME]
SOLVER = FineTune(recipe=Recipe(epochs=2, batch_size=7, optimizer="nesterov", lr="auto", momentum=0.9, average=0.3))
BRIEF = replace(PRESET, build=lambda problem, seed: clone(PRESET.build(problem, seed), {"solver": SOLVER}))


def with_brief_refits(patch):
    """Replace the preset by the one with two epochs, until the patch is undone."""
    patch.setitem(METHODS, NAME, BRIEF)
