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

ResNet-18 has {classes:,} classes and images of 3×32×32, in batches of 128. The exact GGN is of 2 rows, and is compared
with plain passes in a batch of 128. The transformer has one block of width 64, a vocabulary of {vocabulary:,} tokens,
and texts of {tokens} tokens, in batches of 8.

Times are without the eigendecompositions, which are made once per fit and depend on the widths of the layers. They are
divided by the time of plain forward and backward passes over as many rows in the same process. *Curvature* is the
computation of the curvature alone. *Fit* adds the checks of the data (two forward passes, and some rows of each batch
alone) and the comparison of every row with plain autograd. On ResNet-18 the factors come from the pass on the user's
module that this comparison needs; on the transformer, whose embedding is no norm, the rows have a pass of their own and
the comparison adds a forward and a backward pass and the gradients of the weights from the factors. For "expand", the
sums a aᵀ over all pixels take more time than the network.
The embedding of the transformer is a parameter without Kronecker factors, whose diagonal needs a dense gradient of
{vocabulary:,} × 64 numbers per row.

*Network passes* are those of the fit's pass counter, with and without the comparison. It counts every backward pass as
two thirds of a pass. That of the factors takes half of it, since no gradients of the weights are made.

Without the comparisons the curvature is below the goal. The two passes over the data and the comparison of every row
with plain autograd, which are what finds wrong derivatives, take the rest, at every number of rows.

"""
_HEADER = (
    *("network", "P", "hessian_structure", "fisher", "kfac_approx", "N", "plain passes, s", "decompositions, s"),
    *("curvature, in plain passes", "goal", "", "fit, in plain passes", "goal", ""),
    *("network passes", "without comparison", "peak, GiB"),
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
    approx = options.get("kfac_approx", "expand") if options["hessian_structure"] == "kron" else "–"
    goal = _PASSES if sampled and options["hessian_structure"] == "kron" else None
    curvature, fit = (row[f"{what}_seconds"] / row["plain_seconds"] for what in ("curvature", "fit"))
    return [
        *(row["network"], f"{row['n_parameters']:,}", options["hessian_structure"], options.get("fisher", "exact")),
        *(approx, str(row["n_data"]), f"{row['plain_seconds']:.2f}", f"{row['decomposition_seconds']:.1f}"),
        *(f"{curvature:,.1f}", *verdict(curvature, goal, at_most=True)),
        *(f"{fit:,.1f}", *verdict(fit, goal, at_most=True)),
        *(f"{row['passes']:,.1f}", f"{row['passes_without_check']:,.1f}", gib(row["peak"])),
    ]
