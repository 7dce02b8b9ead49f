"""docs/benchmarks/regvar.md from what was measured."""

from __future__ import annotations

from benchmarks.machine import machine
from benchmarks.markdown import gib, table, verdict
from benchmarks.records import Measured
from benchmarks.regvar import exponents, memory, step

__all__ = ["to_markdown"]

_STEP, _INFERENCE, _OUTPUTS = 1.1, 2.1, 1.01
_HEAD = """# What RegVar costs

Measured on {machine}
Float32; methods take turns in one process, medians of three (six where three lay more than 30 %
apart); peaks are those of a process of their own, above the imports.
`python -m benchmarks --select regvar` makes this page.

## The mean-absolute form in one's own loop

A step of SGD on 64 rows with `mean_absolute_penalty` in its loss, over the plain step; and the variance of
`RegularizedPair`, with its checks, over one forward pass of {asked} rows; with fewer rows the checks of the
weights, which do not depend on them, weigh more.

"""
_MEMORY = """
The peak of a step with the term grows by {slope:.3f} tensors of outputs more than that of a plain one (a line through
outputs of {outputs} MiB, where it is {extra} MiB more; {constant:.1f} MiB without any; goal ≤ 1, to a
hundredth: {reached}).

## Memory of a fit

The rise of the peak in a `RegVar` fit of posterior draws, without an exact block, on an MLP of {n:,} parameters, by
draws. The slope of the fitted line is what one draw more costs, in vectors of P numbers.

"""
_COST = """
Both slopes are above the one vector a replica that an answer takes: copies that a fit makes on its way are in the peak.

## Cost in N and in P

Seconds of a fit of {draws} draws without an exact block (which costs the cube of the last layer's size beside), by rows
at {size:,} parameters and by parameters at {rows} rows; `FineTune` with a fixed number of epochs, `LinearResponse` with
a fixed number of products. The exponent is the slope in logarithms. Where seconds fall as the size grows, other
programs were in the way, and the exponent says nothing.

"""


def to_markdown(rows: dict[str, Measured]) -> str:
    """The page, of what there is."""
    parts = [_HEAD.format(machine=machine(), asked=step.QUERIES), _steps(rows)]
    if "step-memory" in rows:
        parts.append(_memory(rows))
    if any(name.startswith("exponents") for name in rows):
        parts.append(_exponents(rows))
    return "".join(parts)


def _steps(rows: dict[str, Measured]) -> str:
    header = ("network", "plain step, ms", "with the term", "goal", "", "forward, ms", "inference", "goal", "")
    lines = []
    for name, row in _of(rows, "step-", list(step.MODELS)):
        trained, asked = row["regularized"] / row["plain"], row["inference"] / row["forward"]
        lines.append(
            [
                *(name, f"{row['plain'] * 1e3:.2f}", f"{trained:.3f}", *verdict(trained, _STEP, at_most=True)),
                *(f"{row['forward'] * 1e3:.2f}", f"{asked:.2f}", *verdict(asked, _INFERENCE, at_most=True)),
            ]
        )
    return table(header, lines) + "\n"


def _memory(rows: dict[str, Measured]) -> str:
    extra = rows["step-memory"]
    found = _of(rows, "memory-", list(memory.SOLVERS))
    if not found:
        return ""
    header = ("solver", *(f"K = {k}, GiB" for k in found[0][1]["replicas"]), "slope, P", "at K = 0, GiB", "plain, GiB")
    lines = [
        [
            *(name, *map(gib, row["peaks"]), f"{row['slope_in_p']:.1f}"),
            *(gib(row["intercept"]), gib(row["plain"])),
        ]
        for name, row in found
    ]
    text = _MEMORY.format(
        slope=extra["slope"],
        constant=extra["constant"] / 2**20,
        outputs=_mib(extra["outputs"]),
        extra=_mib(extra["extra"]),
        reached=verdict(extra["slope"], _OUTPUTS, at_most=True)[1],
        n=found[0][1]["n_parameters"],
    )
    return text + table(header, lines) + "\n"


def _mib(sizes: list[int]) -> str:
    return ", ".join(f"{size / 2**20:.1f}" for size in sizes)


def _exponents(rows: dict[str, Measured]) -> str:
    found = _of(rows, "exponents-", list(exponents.SOLVERS))
    first = found[0][1]
    header = (
        "solver",
        *(f"N = {n}" for n in first["rows"]),
        "exponent",
        *(f"P = {p:,}" for p in first["sizes"]),
        "exponent",
    )
    lines = [
        [
            *(name, *(f"{s:.2f}" for s in row["seconds_by_rows"]), f"{row['exponent_in_n']:.2f}"),
            *(*(f"{s:.2f}" for s in row["seconds_by_size"]), f"{row['exponent_in_p']:.2f}"),
        ]
        for name, row in found
    ]
    text = _COST.format(draws=exponents.DRAWS, size=first["sizes"][0], rows=exponents.N_DATA)
    return text + table(header, lines) + "\n"


def _of(rows: dict[str, Measured], prefix: str, names: list[str]) -> list[tuple[str, Measured]]:
    """The rows of a group, by their names in full."""
    return [(name, rows[f"{prefix}{i}"]) for i, name in enumerate(names) if f"{prefix}{i}" in rows]
