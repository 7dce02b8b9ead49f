"""The page docs/benchmarks/quality.md: medians of the measurements over seeds."""

from __future__ import annotations

import statistics
from collections import defaultdict

from benchmarks.machine import machine
from benchmarks.markdown import table
from benchmarks.quality.networks import NETWORKS
from benchmarks.records import Measured

__all__ = ["DELTAS", "SEEDS", "name_of", "to_markdown"]

DELTAS, SEEDS = (1.0, 10.0), range(5)
_HEAD = """# Quality by cost

Measured on {machine}
Digits in float64; the variance of each output at the queries (500 for the MLP, 60 for the CNN) is compared with that
of the exact full GGN. Numbers are medians over the seeds, with the worst in brackets; other programs were running.
A pass is a forward and a backward pass over all training rows. It includes all work of `fit`, such as the search for λ
and the learning rate. The passes are those of all draws together; training one network takes 100. K = 16 unless stated
otherwise. The command of this page is `python -m benchmarks --select quality`.

Spearman: rank correlation; relative RMSE: of variance/exact − 1; ratio: mean variance over mean exact variance; A-norm
error: per effective dimension, from the draws alone (docs/math.md, section 5).

"""


def name_of(network: str, delta: float, seed: int) -> str:
    """Return the name of a row."""
    return f"quality-{network}-{delta:g}-{seed}"


def to_markdown(rows: dict[str, Measured]) -> str:
    """Return the text of the page, with one table per network and prior precision."""
    parts = [_HEAD.format(machine=machine())]
    for network in NETWORKS:
        for delta in DELTAS:
            found = [rows[name] for seed in SEEDS if (name := name_of(network, delta, seed)) in rows]
            if found:
                parts.append(f"## {network.upper()}, {found[0]['n_parameters']:,} parameters, δ = {delta:g}, ")
                parts.append(f"{len(found)} seed{'s' * (len(found) > 1)}\n\n{_table(found)}\n\n")
    return "".join(parts).rstrip() + "\n"


def _table(found: list[Measured]) -> str:
    header = (
        "method",
        "passes",
        "per draw",
        "trainings",
        "seconds",
        "Spearman",
        "relative RMSE",
        "ratio",
        "A-norm error",
    )
    by_index: dict[int, list[Measured]] = defaultdict(list)
    for measured in found:
        for index, point in enumerate(measured["points"]):
            by_index[index].append(point)
    return table(header, [_line(points) for points in by_index.values()])


def _line(points: list[Measured]) -> list[str]:
    def median(key: str) -> float:
        return float(statistics.median(point[key] for point in points))

    first, passes = points[0], median("passes")
    ratios = [point["mean_ratio"] for point in points]
    worst = max(ratios, key=lambda ratio: abs(ratio - 1))
    name = first["method"] + (f", {first['members']} members" if "members" in first else "")
    return [
        *(name, f"{passes:.0f}", f"{median('passes_per_draw'):.1f}" if "passes_per_draw" in first else "–"),
        *(f"{passes / 100:.2f}", f"{median('seconds'):.1f}"),
        f"{median('spearman'):.3f} ({min(p['spearman'] for p in points):.3f})",
        f"{median('relative_rmse'):.3f} ({max(p['relative_rmse'] for p in points):.3f})",
        f"{statistics.median(ratios):.3f} ({worst:.3f})",
        f"{median('a_norm_error'):.3f}" if "a_norm_error" in first else "–",
    ]
