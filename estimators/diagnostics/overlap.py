"""Rows that occur in two sets, compared bit by bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from estimators.diagnostics.context import DiagnosticContext
from estimators.diagnostics.findings import Finding, Level
from estimators.persistence.checksums import row_hashes

__all__ = ["overlap_findings"]

_MANY = 0.05
"""The fraction of shared rows above which an overlap is an error."""


def overlap_findings(context: DiagnosticContext) -> Iterator[Finding]:
    """Find repeated training rows, and rows of validation and test that occur in an earlier set."""
    sets = {"train": context.objective.batches, **context.splits}
    # of the inputs without labels, so that rows with different labels count as equal
    hashes = {name: [row for batch in batches for row in row_hashes(batch.x)] for name, batches in sets.items()}
    yield _repeated(hashes["train"])
    names = list(hashes)
    for i, held_out in enumerate(names):
        for earlier in names[:i]:
            yield _shared(earlier, held_out, hashes)


def _repeated(train: list[bytes]) -> Finding:
    repeated = len(train) - len(set(train))
    measured = f"{repeated:,} of {len(train):,} training rows have the inputs of an earlier one"
    values = {"repeated": repeated, "rows": len(train)}
    if not repeated:
        return Finding("repeated rows", "ok", measured, values=values)
    meaning = "each counts as a separate observation, so that the variance at these inputs is smaller."
    return Finding("repeated rows", "note", measured, meaning, "remove them if they are copies", values)


def _shared(earlier: str, held_out: str, hashes: Mapping[str, list[bytes]]) -> Finding:
    known = set(hashes[earlier])
    n, shared = len(hashes[held_out]), sum(row_hash in known for row_hash in hashes[held_out])
    name = f"{earlier}/{held_out} overlap"
    measured = f"{shared:,} of {n:,} {held_out} rows have the inputs of a row of {earlier}"
    values = {"shared": shared, "rows": n}
    if not shared:
        return Finding(name, "ok", measured, values=values)
    meaning = f"scores on {held_out} are better than on new rows, and the variance is too small."
    level: Level = "error" if shared > _MANY * n else "warning"
    return Finding(
        name, level, measured, meaning, "remove the copies, and split the rows before any other step", values
    )
