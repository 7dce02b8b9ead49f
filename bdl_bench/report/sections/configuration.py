"""The settings of a task, the fit reports, and the findings of the pre-flight diagnostics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bdl_bench.report.results import TaskResults
from bdl_bench.report.sections.context import Context

__all__ = ["Configuration", "configuration"]


@dataclass(frozen=True)
class Configuration:
    """Settings of the first record, fit reports by method, and findings of the pre-flight diagnostics."""

    template: ClassVar[str] = "configuration.html"
    task: str
    settings: dict[str, str]
    training: str
    fit_reports: dict[str, dict[str, str]]
    preflight: dict[str, dict[str, str]]

    @property
    def warned(self) -> bool:
        """Whether a finding of the pre-flight diagnostics is not "ok"."""
        return any(not answer.startswith("ok") for answers in self.preflight.values() for answer in answers)


def configuration(context: Context) -> Configuration:
    """Return the configuration of a task."""
    results = context.results
    first = {m: next(iter(seeds.values())) for m, seeds in results.finished.items()}
    return Configuration(
        results.name,
        next(iter(first.values())).configuration,
        _training(results),
        {m: record.fit_report for m, record in first.items() if record.fit_report},
        _preflight(results),
    )


def _training(results: TaskResults) -> str:
    trainings = [r.training for seeds in results.finished.values() for r in seeds.values() if r.training is not None]
    trained = [t for t in trainings if t.recipe is not None]
    return (trained or trainings)[0].summary if trainings else "not recorded"


def _preflight(results: TaskResults) -> dict[str, dict[str, str]]:
    """Return the seeds of each answer, `found[name][answer]`, empty if all seeds agree."""
    answers: dict[str, dict[str, list[str]]] = {}
    for seed, found in _by_seed(results).items():
        for name, answer in found.items():
            answers.setdefault(name, {}).setdefault(answer, []).append(str(seed))
    return {
        name: {answer: f"seed {', '.join(seeds)}" if len(found) > 1 else "" for answer, seeds in found.items()}
        for name, found in answers.items()
    }


def _by_seed(results: TaskResults) -> dict[int, dict[str, str]]:
    """Return the findings of each seed, from the first method that has them: all methods share the problem."""
    found: dict[int, dict[str, str]] = {}
    for seeds in results.finished.values():
        for seed, record in seeds.items():
            if record.preflight:
                found.setdefault(seed, record.preflight)
    return dict(sorted(found.items()))
