"""The page docs/benchmarks/tolerance.md: medians of the measurements over seeds, and the worst ones."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.machine import machine
from benchmarks.markdown import table
from benchmarks.records import Measured
from benchmarks.tolerance.measure import RTOLS, TASK_NAMES

__all__ = ["SEEDS", "name_of", "to_markdown"]

SEEDS = range(5)
_HEAD = """# Is the stated error the true one?

`RegVar(model, likelihood, prior_precision=δ, rtol=...)` with its defaults otherwise, compared with the exact GGN
variance of `LinearizedLaplace`. Measured on {machine}
Numbers are medians over up to {seeds} seeds, with the worst in brackets. Errors are relative root mean squares over
rows and outputs. *Stated* is `relative_error_`; *stated/true* is its ratio to the error at test rows, the smallest over
the seeds. *Elsewhere* is the largest error over the sets of out-of-distribution and shifted rows. *Products* are
products with the curvature per draw (K = 16), with those for the probes. *Outside* counts exact variances outside of
the bounds, over all rows, outputs and seeds. AUROC is that of the mean variance for out-of-distribution rows;
*change* is its largest distance to the AUROC of the exact variance. The command of this page is `python -m benchmarks
--select tolerance`.

"""


def name_of(task: str, seed: int) -> str:
    """Return the name of a row."""
    return f"tolerance-{task}-{seed}"


def to_markdown(rows: dict[str, Measured]) -> str:
    """Return the text of the page, with one table per tolerance."""
    parts = [_HEAD.format(machine=machine(), seeds=len(SEEDS))]
    for i, rtol in enumerate(RTOLS):
        lines = []
        for task in TASK_NAMES:
            found = [rows[name] for seed in SEEDS if (name := name_of(task, seed)) in rows]
            if found:
                lines.append(_line(task, found[0]["n_parameters"], [row["points"][i] for row in found]))
        header = ("task", "weights", "stated", "test rows", "stated/true", "elsewhere", "products", "outside")
        parts.append(f"## rtol = {rtol:g}\n\n{table((*header, 'AUROC change'), lines)}\n\n")
    return "".join(parts).rstrip() + "\n"


def _line(task: str, n_parameters: int, points: list[dict[str, Any]]) -> tuple[str, ...]:
    test = [point["errors"]["test"] for point in points]
    elsewhere = [max((e for name, e in point["errors"].items() if name != "test"), default=None) for point in points]
    changes = [abs(a - p["exact_auroc"][name]) for p in points for name, a in p["auroc"].items()]
    ratios = [point["relative_error"] / max(true, 1e-12) for point, true in zip(points, test, strict=True)]
    known = [error for error in elsewhere if error is not None]
    return (
        task,
        f"{n_parameters:,}",
        _worst([point["relative_error"] for point in points]),
        _worst(test),
        f"{min(ratios):.2f}" if max(test) > 1e-6 else "–",
        _worst(known) if known else "–",
        f"{statistics.median(p['products'] for p in points):.1f} ({max(p['products'] for p in points):.1f})",
        str(sum(point["outside"] for point in points)),
        f"{max(changes):.3f}" if changes else "–",
    )


def _worst(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({max(values):.3f})"
