"""How a task was set up, what each fit says of itself, and what the pre-flight check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bdl_bench.report.results import TaskResults
from bdl_bench.report.sections.context import Context

__all__ = ["Configuration", "configuration"]


@dataclass(frozen=True)
class Configuration:
    """Settings of the first record; reports by method; findings of the pre-flight check, as far as they differ."""

    template: ClassVar[str] = "configuration.html"
    task: str
    settings: dict[str, str]
    training: str
    fit_reports: dict[str, dict[str, str]]
    preflight: dict[str, dict[str, str]]


def configuration(context: Context) -> Configuration:
    """Always there."""
    results = context.results
    first = {m: next(iter(seeds.values())) for m, seeds in results.done.items()}
    return Configuration(
        results.name,
        next(iter(first.values())).configuration,
        _training(results),
        {m: record.fit_report for m, record in first.items() if record.fit_report},
        _preflight(results),
    )


def _training(results: TaskResults) -> str:
    trainings = [r.training for seeds in results.done.values() for r in seeds.values() if r.training is not None]
    recipes = [t.recipe for t in trainings if t.recipe is not None]
    return recipes[0] if recipes else "none: the network came trained"


def _preflight(results: TaskResults) -> dict[str, dict[str, str]]:
    """`found[name][answer]` is who says so: "all", or the methods."""
    answers: dict[str, dict[str, list[str]]] = {}
    for method, seeds in results.done.items():
        for record in seeds.values():
            for name, answer in record.preflight.items():
                answers.setdefault(name, {}).setdefault(answer, []).append(f"{method}, seed {record.seed}")
    return {
        name: {answer: _who(who) for answer, who in by.items()} if len(by) > 1 else dict.fromkeys(by, "")
        for name, by in answers.items()
    }


def _who(cells: list[str]) -> str:
    return "; ".join(cells[:3]) + (f" and {len(cells) - 3} more" if len(cells) > 3 else "")
