"""The command `bdl-bench sbc`: simulation-based calibration of methods."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bdl_bench.methods import POSTERIOR, methods_named
from bdl_bench.plugins import load_installed_plugins, load_plugins
from bdl_bench.tasks import resolve_task
from bdl_bench.verify.sbc import PresetMethod, SbcCase, SbcResult, run_sbc, small_cases
from bdl_bench.verify.sbc.page import HEADER, table_rows

__all__ = ["DEFAULT_METHODS", "cases_of", "run", "show", "unexpected"]

DEFAULT_METHODS = (POSTERIOR, "laplace", "laplace-kron", "last-layer-laplace", "regvar", "ensemble", "swag")
"""The sampler, which must have uniform ranks, and approximations of different kinds."""


def cases_of(source: str | None, seed: int, n_queries: int) -> dict[str, SbcCase]:
    """Return the case of a task or of a reference to a factory; None: the two bundled ones."""
    if source is None:
        return small_cases()
    return {source: SbcCase.of_problem(resolve_task(source).problem(seed), n_queries=n_queries)}


def run(
    cases: Mapping[str, SbcCase],
    methods: list[str],
    out: Path,
    *,
    n_replications: int,
    seed: int,
    jobs: int,
    plugins: list[str],
) -> SbcResult:
    """Run the replications, with a line on the terminal at each tenth of them."""
    prepare = partial(_load_plugins, tuple(plugins))
    prepare()
    builds = {method.name: PresetMethod(method.name, prepare) for method in methods_named(methods)}

    def listener(done: int, total: int) -> None:
        if done == total or done % max(1, total // 10) == 0:
            print(f"{done} of {total} replications", flush=True)

    return run_sbc(cases, builds, out=out, n_replications=n_replications, seed=seed, jobs=jobs, listener=listener)


def show(result: SbcResult, console: Console) -> None:
    """Print the table, and the reasons of replications without ranks."""
    table = Table(*HEADER, box=None, pad_edge=False)
    for row in table_rows(result.summaries):
        table.add_row(*map(escape, row))
    console.print(table)
    for summary in result.summaries:
        for error in dict.fromkeys(summary.errors):
            n = summary.errors.count(error)
            console.print(escape(f"{summary.case}, {summary.method}: {n} without ranks: {' '.join(error.split())}"))


def unexpected(result: SbcResult) -> bool:
    """Return whether the reference posterior was run and is not uniform: that is an error, not a result."""
    return any(s.method == POSTERIOR and not s.is_uniform for s in result.summaries)


def _load_plugins(plugins: tuple[str, ...]) -> None:
    load_installed_plugins()
    load_plugins(list(plugins))
