"""The page docs/benchmarks/core.md."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.core.work import STEPS
from benchmarks.machine import machine
from benchmarks.markdown import gib, table, verdict
from benchmarks.records import Measured

__all__ = ["to_markdown"]

_TIMES = ("work", "step", "ours, s", "laplace-torch, s", "ratio", "goal", "")
_MEMORY = ("work", "our peak, GiB", "goal, GiB", "", "laplace-torch, GiB", "difference", "from float64")
_HEAD = """# Comparison with laplace-torch

Measured on {machine}

Float32, 1000 rows in batches of 500 (50 for C = 300, since larger Jacobians of laplace-torch do not fit into memory).
Both libraries run alternately in one process; times are medians of three repeats (six if the spread is above 30 %).
laplace-torch uses its fastest backend in each step, out of BackPACK, curvlinops and ASDL. `ratio` is its time divided
by ours, per query if the numbers of queries differ. Other programs may have been running, so the ratios are more
reliable than the seconds. The command of this page is `python -m benchmarks --select core`.

"""
_MIDDLE = """
Peak memory is the increase in resident memory above the imports, in a process with one fit and one prediction of the
variance. *by size* marks rows that were not run: the minimum that laplace-torch would allocate (its Jacobian at the
queries, or five P×P matrices during the inversion). The difference is max |ours − theirs| / max |theirs|, by backend
if several were fastest in some step. "From float64" is the difference between our results in float32 and in float64.

"""
_TAIL = """
The Kronecker forms of both libraries agree for layers without bias, and these networks have none. Ours has the bias
as the last column of the weight; laplace-torch has a separate factor. For convolutions, its BackPACK backend has a
different matrix than its other two backends, which agree with ours to 1e-15 in float64. Its diagonal of the CNN is
2.5e-4 off in float32 on this machine; in float64 it is within 3e-7 of ours in float32. Our dense algebra is in
float64, laplace-torch's in float32: half the speed, for higher precision (`numerics/dtype.py`). Queries are solved in
float32 if the condition number of A is small enough. Ours factors A in `fit`, laplace-torch inverts it at the first
variance, so the sum of both steps is the fair comparison. The shortest times consist of checks of the query and of
the weights, and of the forward pass.

Reasons for missed goals. *Dense, P = 10,033*: of 13.5 s of a fit, 9.1 are the Cholesky factor and 3.0 the products,
both at the rate of a large product in float64; in float32 the factor takes 5.8 s, which would make the ratio about
4.5. With fewer rows than parameters, as here, `inverse="auto"` takes the dual form. *kron and diag of the CNN*: a
query has 10 outputs, whose Jacobians alone are 2.5 (diag) and 3.2 (kron) · 10⁹ multiplications and additions for 10
rows, 27 and 34 ms at the 93 · 10⁹ a second that a square product of 2,048 reaches here; the rest is pooling,
unfolding and the checks. *Last layer, diag, C = 100*: of 0.37 ms the forward pass is 0.10, which is all that 10⁴
leaves; with C = 300 it is reached.
"""


def to_markdown(rows: dict[str, Measured]) -> str:
    """Return the text of the page."""
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
