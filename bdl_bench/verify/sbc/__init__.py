"""Simulation-based calibration: ranks of the true function among posterior draws, over data drawn from the model."""

from bdl_bench.verify.sbc.case import SbcCase, Simulation, small_cases
from bdl_bench.verify.sbc.page import write_sbc
from bdl_bench.verify.sbc.ranks import Ranks
from bdl_bench.verify.sbc.run import PresetMethod, SbcResult, run_sbc
from bdl_bench.verify.sbc.summary import SbcSummary

__all__ = [
    "PresetMethod",
    "Ranks",
    "SbcCase",
    "SbcResult",
    "SbcSummary",
    "Simulation",
    "run_sbc",
    "small_cases",
    "write_sbc",
]
