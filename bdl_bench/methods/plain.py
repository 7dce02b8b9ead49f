"""The trained network as it is: what every method is compared with."""

from __future__ import annotations

from bdl_bench.methods.registry import BASELINE, Method, preset, register
from estimators.baselines.map import MAP

register(
    [Method(BASELINE, "the trained network alone; its epistemic variance is zero", preset(MAP), default=True)],
)
