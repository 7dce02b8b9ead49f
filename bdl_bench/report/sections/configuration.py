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

    @property
    def warned(self) -> bool:
        """Whether the pre-flight check found anything but "ok"."""
        return any(not answer.startswith("ok") for by in self.preflight.values() for answer in by)


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
    trained = [t for t in trainings if t.recipe is not None]
    return (trained or trainings)[0].summary if trainings else "not recorded"


def _preflight(results: TaskResults) -> dict[str, dict[str, str]]:
    """`found[name][answer]`: the seeds that have it, empty where all agree. Methods of a seed share their problem."""
    answers: dict[str, dict[str, list[str]]] = {}
    for seed, found in _by_seed(results).items():
        for name, answer in found.items():
            answers.setdefault(name, {}).setdefault(answer, []).append(str(seed))
    return {
        name: {answer: f"seed {', '.join(seeds)}" if len(by) > 1 else "" for answer, seeds in by.items()}
        for name, by in answers.items()
    }


def _by_seed(results: TaskResults) -> dict[int, dict[str, str]]:
    """The findings of the first method that has some, for each seed."""
    found: dict[int, dict[str, str]] = {}
    for seeds in results.done.values():
        for seed, record in seeds.items():
            if record.preflight:
                found.setdefault(seed, record.preflight)
    return dict(sorted(found.items()))
