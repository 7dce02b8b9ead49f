"""The pictures of README.md and docs/guide, drawn anew from records.

    bdl-bench compare toy-gap --methods all --tune-budget 5 --seeds 1 --out gap
    python tools/pictures.py bands gap docs/images/between.png
    bdl-bench compare toy-gap wine breast-cancer diabetes --seeds 5 --out some
    python tools/pictures.py page some docs/images/report.png        # needs Chromium

`bands` shows methods at their tuned best: with the option, variance scale and noise of the lowest validation NLL.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from bdl_bench.records import RecordStore
from bdl_bench.report import write_report
from bdl_bench.report.figures.canvas import styled
from bdl_bench.report.formatting import number
from bdl_bench.report.palette import Palette
from bdl_bench.report.results import TaskResults, group_by_task, load_records
from bdl_bench.report.sections.bands import draw_band

COLUMNS = 6
LEFT_OUT = (
    *("laplace-torch", "regvar-pointwise", "regvar-param-probes", "laplace-kron-mc"),
    *("subnetwork-laplace", "laplace-lowrank", "regvar-amortized-finetune"),
    *("gradient-norm", "ivon"),
)
"""Beginnings of names: the same variance on this task by another package, solver or option; a score that is no
variance; and IVON, whose training diverges on this task at its preset."""
LIMITS = -3.2, 4.2
"""Of y: about twice the range of the mean. Wider bands are cut."""


def bands(directory: Path, target: Path) -> None:
    """Draw the tuned bands of every method of a task with one input, best test NLL first."""
    store = RecordStore(directory)
    (results,) = group_by_task(store, load_records(store))
    seed = results.seeds[0]
    methods = [m for m in results.tuned_methods if not m.startswith(LEFT_OUT)]
    nll = {m: results.values(m, "reg/NLL", tuned=True)[0] for m in methods}
    methods.sort(key=nll.__getitem__)
    with styled():
        _figure(results, methods, seed, nll).savefig(target, dpi=130, facecolor="white")


def _figure(results: TaskResults, methods: list[str], seed: int, nll: dict[str, float]) -> Figure:
    views = {m: results.predictions(m, seed, tuned=True) for m in methods}
    grids = {m: view.subset("plot_grid") for m, view in views.items()}
    palette = Palette(methods)
    data = results.predictions(methods[0], seed).subset("train")
    n_rows = -(-len(methods) // COLUMNS)
    figure = Figure(figsize=(1.75 * COLUMNS, 1.5 * n_rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(n_rows, COLUMNS, sharex=True, sharey=True)).reshape(-1)
    for ax, method in zip(axes, methods, strict=False):
        draw_band(ax, palette[method], grids[method], limits=LIMITS, data=data)
        ax.set_title(f"{method}\nNLL {number(nll[method])}", fontsize=7.5, loc="left", color=palette[method].colour)
    for ax in axes[len(methods) :]:
        ax.set_visible(False)
    return figure


def page(directory: Path, target: Path) -> None:
    """Save what a reader sees first of the report, 1280 pixels wide."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    report = write_report(directory)
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        size = ["--window-size=1280,1180", f"--screenshot={target.resolve()}"]
        subprocess.run([chromium, *options, *size, report.resolve().as_uri()], check=True, capture_output=True)


def main() -> None:
    """Draw one picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("bands", "page"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("target", type=Path)
    given = parser.parse_args()
    (bands if given.what == "bands" else page)(given.directory, given.target)


if __name__ == "__main__":
    main()
