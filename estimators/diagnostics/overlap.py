"""Rows that two sets share, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from estimators.data.training_data import TrainingData
from estimators.diagnostics.context import DiagnosticContext
from estimators.diagnostics.findings import Finding, Level
from estimators.persistence.checksums import row_hashes

__all__ = ["overlap_findings"]

_MANY = 0.05


def overlap_findings(subject: DiagnosticContext) -> Iterator[Finding]:
    """Inputs of validation and test that are among those of the sets before, and repeated training rows."""
    sets = {"train": subject.objective.batches, **subject.splits}
    digests = {name: _digests(batches) for name, batches in sets.items()}
    yield _repeated(digests["train"])
    names = list(digests)
    for i, held_out in enumerate(names):
        for earlier in names[:i]:
            yield _shared(earlier, held_out, digests)


def _digests(batches: TrainingData) -> list[bytes]:
    """Of the inputs alone: a row with another label is the same row."""
    return [digest for batch in batches for digest in row_hashes(batch.x)]


def _repeated(train: list[bytes]) -> Finding:
    repeated = len(train) - len(set(train))
    measured = f"{repeated:,} of {len(train):,} training rows have the inputs of an earlier one"
    values = {"repeated": repeated, "rows": len(train)}
    if not repeated:
        return Finding("repeated rows", "ok", measured, values=values)
    meaning = "each counts as an observation of its own, so that the variance there is smaller."
    return Finding("repeated rows", "note", measured, meaning, "drop_duplicates, if they are copies", values)


def _shared(earlier: str, held_out: str, digests: Mapping[str, list[bytes]]) -> Finding:
    known = set(digests[earlier])
    n, shared = len(digests[held_out]), sum(digest in known for digest in digests[held_out])
    name = f"{earlier}/{held_out} overlap"
    measured = f"{shared:,} of {n:,} {held_out} rows have the inputs of a row of {earlier}"
    values = {"shared": shared, "rows": n}
    if not shared:
        return Finding(name, "ok", measured, values=values)
    meaning = f"scores on {held_out} are better than on new rows, and their variance too small."
    level: Level = "error" if shared > _MANY * n else "warning"
    return Finding(name, level, measured, meaning, "split by row before anything else, without the copies", values)
