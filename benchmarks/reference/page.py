"""The page docs/benchmarks/reference.md: when the reference posterior is reached, and what it costs."""

from __future__ import annotations

import math

from benchmarks.machine import machine
from benchmarks.markdown import table
from benchmarks.records import Measured
from benchmarks.reference.measure import HARD_CASES, TASK_NAMES

__all__ = ["SEEDS", "hard_name_of", "name_of", "to_markdown", "two_runs_name_of"]

SEEDS = range(3)
_HEAD = """# When is the reference posterior reached?

`ReferencePosterior` with its defaults, digits in float32. Measured on {machine}
*Gradients* are passes over all training rows, summed over chains. *CPU s* is the processor time of the fit on one
thread, with its judgements of convergence. R-hat is the largest, and ESS the smallest, over all outputs at the rows
of a set. *TV/2* and *W2/2* are half of the distance between even and odd chains: the error bar of any
distance to this reference.
A set is *reached* if it meets the criteria of [ConvergenceCriteria](../reference/index.md): R-hat at most 1.01, ESS at
least 1,000, that of squares at least 400, TV/2 at most .005 (other than test rows: .015), no divergence, and an
acceptance of .65 to .95. The command of this page is `python -m benchmarks --select reference`.

"""
_TWO_RUNS = """## Two independent runs

Chains from two seeds on the same network and data (seed 0 of the task). The noise floor is half of the distance between
the halves of one run, and estimates the error of a whole run, so that the distance of two runs is expected to be √2
times the noise floor.

"""
_TWO_RUNS_COLUMNS = ("task", "set", "distance", "of the two runs", "noise floors", "distance / (√2 · noise floor)")
_COLUMNS = ("task, seed", "δ", "weights", "gradients", "CPU s", "R-hat", "ESS", "ESS of squares", "TV/2", "W2/2")
_SET_COLUMNS = ("task, seed", "set", "R-hat", "ESS", "TV/2", "variance/2", "reached")


def name_of(task: str, seed: int) -> str:
    """Return the name of a row."""
    return f"reference-{task}-{seed}"


def hard_name_of(task: str) -> str:
    """Return the name of the row of a hard case."""
    return f"reference-hard-{task}"


def two_runs_name_of(task: str) -> str:
    """Return the name of the row of two independent runs."""
    return f"reference-two-runs-{task}"


def to_markdown(rows: dict[str, Measured]) -> str:
    """Return the text of the page."""
    found = {(task, str(seed)): rows.get(name_of(task, seed)) for task in TASK_NAMES for seed in SEEDS}
    measured = {f"{task}, {seed}": row for (task, seed), row in found.items() if row is not None}
    hard = {f"{task}, 0": rows[hard_name_of(task)] for task in HARD_CASES if hard_name_of(task) in rows}
    parts = [_HEAD.format(machine=machine()), _fits("Fits, at 256 training rows", measured)]
    sets = [_set(name, part, row) for name, row in measured.items() for part in row["sets"]]
    parts.append(f"## Rows that the fit did not see\n\n{table(_SET_COLUMNS, sets)}\n\n")
    if runs := {task: rows[two_runs_name_of(task)] for task in TASK_NAMES if two_runs_name_of(task) in rows}:
        parts.append(_TWO_RUNS)
        lines = [_two_runs(task, part, row["sets"][part]) for task, row in runs.items() for part in row["sets"]]
        parts.append(f"{table(_TWO_RUNS_COLUMNS, lines)}\n\n")
    if hard:
        parts.append(_fits("Hard cases: a small prior precision", hard))
    return "".join(parts).rstrip() + "\n"


def _fits(title: str, rows: dict[str, Measured]) -> str:
    lines = [_line(name, row) for name, row in rows.items()]
    return f"## {title}\n\n{table((*_COLUMNS, 'reached'), lines)}\n\n"


def _line(name: str, row: Measured) -> tuple[str, ...]:
    fit, floor = row["fit"]["rows"], row["fit"]["rows"]["noise_floor"]
    return (
        name,
        f"{row['prior_precision']:g}",
        f"{row['n_parameters']:,}{', collapsed' if row['collapsed'] else ''}",
        f"{row['fit']['n_gradients']:,}",
        f"{row['processor_seconds']:.0f}",
        _number(fit["r_hat"], ".4f"),
        _number(fit["bulk_ess"], ",.0f"),
        _number(fit["squares_ess"], ",.0f"),
        f"{floor['total_variation']:.4f}",
        f"{floor['w2']:.4f}",
        "yes" if row["reached"] else "; ".join(row["failures"]),
    )


def _set(name: str, part: str, row: Measured) -> tuple[str, ...]:
    found = row["sets"][part]
    return (
        name,
        part,
        _number(found["r_hat"], ".4f"),
        _number(found["bulk_ess"], ",.0f"),
        f"{found['noise_floor']['total_variation']:.4f}",
        f"{found['noise_floor']['variance']:.3f}",
        "; ".join(row["set_failures"][part]) or "yes",
    )


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _two_runs(task: str, part: str, found: Measured) -> tuple[str, ...]:
    floors = found["noise_floors"]
    ratio = found["distance"] / math.sqrt(sum(floor**2 for floor in floors))
    field = {"w2": "W2", "total_variation": "total variation"}[found["field"]]
    return task, part, field, f"{found['distance']:.4f}", ", ".join(f"{floor:.4f}" for floor in floors), f"{ratio:.2f}"
