"""The set: its tasks and methods, run by `bdl-bench compare`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

__all__ = ["LEFT_OUT", "METHODS", "SEEDS", "TASKS", "TIMEOUT", "run"]

TASKS = ("concrete", "mnist-5k", "r8-lora")
"""A regression, LeNet on 3,000 real images with shifts, and MiniLM with adapters on newswire with OOD rows."""
METHODS = (
    *("map", "temperature-scaling", "ensemble", "dropout", "swag", "laplace-kron", "laplace-diag"),
    *("last-layer-laplace", "regvar", "regvar-finetune"),
)
"""One or two of each family."""
LEFT_OUT = {"mnist-5k": ("regvar", "regvar-finetune"), "r8-lora": ("regvar", "regvar-finetune", "dropout")}
"""Methods by task that do not end within the time limit, or do not fit.

A product with A for 16 draws takes 12 seconds on LeNet and up to 27 on MiniLM. In MiniLM, attention has dropout of its
own, which `dropout` does not take.
"""
TIMEOUT = 300.0
"""Seconds that a run may take; one that needs more is skipped."""
SEEDS = 3


def run(directory: Path, *, seeds: int = SEEDS, jobs: int = 1) -> None:
    """Run the set; an earlier run in the directory is resumed.

    Args:
        directory: of records and report.
        seeds: number of seeds.
        jobs: concurrent jobs of one thread each.

    Raises:
        subprocess.CalledProcessError: if the command ends with an error other than a run that failed.
    """
    for task in TASKS:
        methods = ",".join(method for method in METHODS if method not in LEFT_OUT.get(task, ()))
        words = ["compare", task, "--methods", methods, "--seeds", str(seeds), "--jobs", str(jobs)]
        command = [sys.executable, "-m", "bdl_bench", *words, "--timeout", str(TIMEOUT), "--out", str(directory)]
        done = subprocess.run(command, check=False)
        if done.returncode not in (0, 1):  # 1: a run failed; its results are missing in the snapshot, which is judged
            raise subprocess.CalledProcessError(done.returncode, command)
