"""The settings of a task, the fit reports, and the findings of the pre-flight diagnostics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bdl_bench.report.results import TaskResults
from bdl_bench.report.sections.context import Context

__all__ = ["Configuration", "Finding", "configuration"]


@dataclass(frozen=True)
class Finding:
    """A finding of the pre-flight diagnostics: its level, what was measured, at which seeds, and what to try."""

    level: str
    measured: str
    seeds: str
    remedy: str


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
    def n_ok(self) -> int:
        """The number of checks that are "ok" at every seed."""
        return len(self.preflight) - len(self.noted)

    @property
    def noted(self) -> dict[str, list[Finding]]:
        """The findings of each check that are not "ok", worst first."""
        found = {name: [_finding(*item) for item in answers.items()] for name, answers in self.preflight.items()}
        listed = {name: [f for f in findings if f.level != "ok"] for name, findings in found.items()}
        order = sorted((n for n in listed if listed[n]), key=lambda n: min(_LEVELS.index(f.level) for f in listed[n]))
        return {name: listed[name] for name in order}

    @property
    def n_warnings(self) -> int:
        """The number of checks with a warning or an error."""
        return sum(any(f.level in ("warning", "error") for f in findings) for findings in self.noted.values())


_LEVELS = ("error", "warning", "note", "ok")
_TRY = "; try: "


def _finding(answer: str, seeds: str) -> Finding:
    """Return the parts of an answer, such as "note: 0.1; try: --converged-map"; one without a level is a note."""
    level, _, rest = answer.partition(": ")
    if level not in _LEVELS:
        level, rest = "note", answer
    measured, _, remedy = rest.partition(_TRY)
    return Finding(level, measured, seeds, remedy)


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
