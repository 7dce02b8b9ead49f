"""The page docs/benchmarks/fisher.md."""

from __future__ import annotations

from benchmarks.fisher.measure import CASES, N_CLASSES, TOKENS, VOCABULARY
from benchmarks.machine import machine
from benchmarks.markdown import gib, table, verdict
from benchmarks.records import Measured

__all__ = ["to_markdown"]

_PASSES = 2.5
_HEAD = """# Many classes

Measured on {machine}
Float32, random data, one thread, processor seconds; other programs were running. The command of this page is
`python -m benchmarks --select fisher`.

ResNet-18 has {classes:,} classes and images of 3×32×32 in batches of 128 (the exact GGN: batches of 1). The transformer
has one block of width 64, a vocabulary of {vocabulary:,} tokens, and texts of {tokens} tokens in batches of 8.

*Time per sample* is the slope between fits of two sizes, divided by the time of a plain forward and backward pass per
sample in the same process. It contains the checks of the data (two forward passes), the comparison of every row with
plain autograd (a forward and a backward pass), and the sums a aᵀ of the Kronecker factors, which for "expand" take more
time than the network. *Passes* are what the fit's pass counter has: network passes per sample, with and without the
comparison. It counts every backward pass as two thirds; that of the factors takes half of it, since no gradients of the
weights are made. Eigendecompositions are once per fit, and grow with the width of the layers, not with N.

"""
_HEADER = (
    *("network", "P", "hessian_structure", "fisher", "kfac_approx", "N", "fit, s", "plain pass, ms"),
    *("time per sample, passes", "goal", "", "passes", "without comparison", "goal", "", "peak, GiB"),
)


def to_markdown(rows: dict[str, Measured]) -> str:
    """Return the text of the page."""
    head = _HEAD.format(machine=machine(), classes=N_CLASSES, vocabulary=VOCABULARY, tokens=TOKENS)
    return head + table(_HEADER, [_line(rows[name]) for name in CASES if name in rows]) + "\n"


def _line(row: Measured) -> list[str]:
    if "failed" in row:
        return [row["network"], row["failed"], *["–"] * (len(_HEADER) - 2)]
    options = row["options"]
    sampled = options.get("fisher", "exact") != "exact"
    slope = row["per_sample_seconds"] / row["plain_seconds"]
    approx = options.get("kfac_approx", "expand") if options["hessian_structure"] == "kron" else "–"
    goal = _PASSES if sampled and options["hessian_structure"] == "kron" else None
    return [
        *(row["network"], f"{row['n_parameters']:,}", options["hessian_structure"], options.get("fisher", "exact")),
        *(approx, ", ".join(map(str, row["sizes"])), ", ".join(f"{s:.1f}" for s in row["fit_seconds"])),
        *(f"{1e3 * row['plain_seconds']:.1f}", f"{slope:,.1f}", *verdict(slope, goal, at_most=True)),
        *(f"{row['passes']:,.1f}", f"{row['passes_without_check']:,.1f}"),
        *(*verdict(row["passes_without_check"], goal, at_most=True), gib(row["peak"])),
    ]
