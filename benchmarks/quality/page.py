"""docs/benchmarks/quality.md from what was measured: medians over seeds."""

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
Digits in float64; the variance of each output at queries (MLP 500, CNN 60) against that of the exact full GGN.
Medians over the seeds, the worst in brackets; other programs were running. A pass is forward and backward over all
training rows, everything in `fit` counted (the searches for λ and the learning rate, targets, noise, block products,
reports); passes are those of all draws together, and a training is 100. K = 16 where nothing else is said.
`python -m benchmarks --select quality` makes this page.

Spearman: rank correlation; relative RMSE: of variance/exact − 1; ratio: mean variance over mean exact variance; A-norm
error: per effective dimension, from the draws alone (docs/math.md, section 5).

"""


def name_of(network: str, delta: float, seed: int) -> str:
    """Of a row."""
    return f"quality-{network}-{delta:g}-{seed}"


def to_markdown(rows: dict[str, Measured]) -> str:
    """A table for each network and prior precision."""
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
        "a draw",
        "trainings",
        "seconds",
        "Spearman",
        "relative RMSE",
        "ratio",
        "A-norm error",
    )
    by_place: dict[int, list[Measured]] = defaultdict(list)
    for measured in found:
        for place, point in enumerate(measured["points"]):
            by_place[place].append(point)
    return table(header, [_line(points) for points in by_place.values()])


def _line(points: list[Measured]) -> list[str]:
    def median(key: str) -> float:
        return float(statistics.median(point[key] for point in points))

    first, passes = points[0], median("passes")
    ratios = [point["mean_ratio"] for point in points]
    farthest = max(ratios, key=lambda ratio: abs(ratio - 1))
    name = first["method"] + (f", {first['members']} members" if "members" in first else "")
    return [
        *(name, f"{passes:.0f}", f"{median('passes_a_draw'):.1f}" if "passes_a_draw" in first else "–"),
        *(f"{passes / 100:.2f}", f"{median('seconds'):.1f}"),
        f"{median('spearman'):.3f} ({min(p['spearman'] for p in points):.3f})",
        f"{median('relative_rmse'):.3f} ({max(p['relative_rmse'] for p in points):.3f})",
        f"{statistics.median(ratios):.3f} ({farthest:.3f})",
        f"{median('a_norm_error'):.3f}" if "a_norm_error" in first else "–",
    ]
