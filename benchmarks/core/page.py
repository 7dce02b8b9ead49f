"""docs/benchmarks/core.md from what was measured."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.core.work import STEPS
from benchmarks.machine import machine
from benchmarks.markdown import gib, table, verdict
from benchmarks.records import Measured

__all__ = ["to_markdown"]

_TIMES = ("work", "step", "ours, s", "laplace-torch, s", "ratio", "goal", "")
_MEMORY = ("work", "our peak, GiB", "goal, GiB", "", "laplace-torch, GiB", "difference", "from float64")
_HEAD = """# Beside laplace-torch

Measured on {machine}

Float32, 1000 rows in batches of 500 (50 for C = 300, or laplace-torch's Jacobians of a batch would not fit), both sides
in turns in one process, medians of three (six where three lay more than 30 % apart). laplace-torch has the backend, of
BackPACK, curvlinops and ASDL, that was fastest in each step. `ratio` is its time over ours, a query where the two have
different numbers of queries. Other programs may have been running: the ratios count, not the seconds.
`python -m benchmarks --select core` makes this page.

"""
_MIDDLE = """
Peaks are those of the resident memory of a process that does nothing but one fit and one reading of the variance,
above the imports. *by size* marks what was not run: the least that laplace-torch would allocate (its Jacobian of the
queries, or five P×P matrices while it inverts). The difference is max |ours − theirs| / max |theirs|, by backend where
several were the fastest of some step; "from float64" is that of our answer and ours for the network in float64.

"""
_TAIL = """
Both sides' Kronecker forms agree where layers have no bias, and those networks have none: ours has the bias as the last
column of its weight, laplace-torch gives it a factor of its own. Its BackPACK backend has another matrix for
convolutions than its other two, which agree with ours to 1e-15 in float64. Its diagonal of the CNN is 2.5e-4 off in
float32 on this machine; in float64 it is within 3e-7 of ours in float32. Our dense algebra is in float64,
laplace-torch's in float32: half of the multiplications a second, in exchange for digits that float32 does not have
(`precision/dtype.py`); queries are solved in float32 where A is conditioned well enough.
Ours factors A in `fit`, laplace-torch inverts it at the first variance: their sum compares like with like.
Of the shortest times nearly all is checks of the query and of the model's weights, and the forward pass.

Why goals are missed. *Dense, P = 10,033*: of 13.5 s of a fit, 9.1 are the Cholesky factor and 3.0 the products, both at
the rate of a large product in float64; in float32 the factor takes 5.8 s, which would make the ratio about 4.5. Where
rows are fewer than parameters, as here, `inverse="auto"` takes the dual form. *kron and diag of the CNN*: a query has
10 outputs, whose slopes and Jacobians alone are 2.5 (diag) and 3.2 (kron) · 10⁹ multiplications and additions for 10
rows, 27 and 34 ms at the 93 · 10⁹ a second that a square product of 2,048 reaches here; the rest is pooling, unfolding
and the checks. *Last layer, diag, C = 100*: of 0.37 ms the forward pass is 0.10, which is all that 10⁴ leaves; with
C = 300 it is reached.
"""


def to_markdown(rows: dict[str, Measured]) -> str:
    """The page."""
    times = table(_TIMES, [line for row in rows.values() for line in _time_lines(row)])
    memory = table(_MEMORY, [_memory_line(row) for row in rows.values()])
    return _HEAD.format(machine=machine()) + times + "\n" + _MIDDLE + memory + "\n" + _TAIL


def _time_lines(row: Measured) -> Iterator[list[str]]:
    for step in STEPS:
        yield _time_line(row, step, [step])
    for together in row["goals"]:
        if together not in STEPS:
            yield _time_line(row, together, together.split(" + "))


def _time_line(row: Measured, step: str, parts: list[str]) -> list[str]:
    ours = sum(row["ours"][part]["median"] for part in parts)
    start = [row["title"], step, f"{ours:.5f}"]
    if row["theirs"] is None:
        return [*start, "out of memory", "–", "–", "–"]
    theirs = sum(row["theirs"][part]["median"] for part in parts)
    fewer = row["queries"] / row["their_queries"] if "fit" not in parts else 1.0
    ratio = theirs * fewer / ours
    shown = f"{theirs:.3f}" + (f" for {row['their_queries']} of {row['queries']} queries" if fewer != 1 else "")
    return [*start, shown, f"{ratio:,.1f}", *verdict(ratio, row["goals"].get(step))]


def _memory_line(row: Measured) -> list[str]:
    goal = row["peak_goal"]
    shown, reached = verdict(row["peak"] / 2**30, None if goal is None else goal / 2**30, at_most=True)
    theirs = [gib(row["their_peak"]) + _few(row)] if "their_peak" in row else []
    if row["their_bytes"] is not None:
        theirs.append(f"{gib(row['their_bytes'])} by size")
    error = f"{row['error']:.1e}" if "error" in row else "–"
    return [row["title"], gib(row["peak"]), shown, reached, "; ".join(theirs), _differences(row["difference"]), error]


def _differences(found: dict[str, float]) -> str:
    if len(set(found.values())) > 1:
        return "; ".join(f"{backend} {difference:.1e}" for backend, difference in found.items())
    return f"{min(found.values()):.1e}" if found else "–"


def _few(row: Measured) -> str:
    return "" if row["their_queries"] == row["queries"] else f" for {row['their_queries']} queries"
