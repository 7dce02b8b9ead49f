"""The page docs/benchmarks/regvar.md."""

from __future__ import annotations

from benchmarks.machine import machine
from benchmarks.markdown import gib, table, verdict
from benchmarks.records import Measured
from benchmarks.regvar import exponents, memory, step

__all__ = ["to_markdown"]

_STEP, _INFERENCE, _OUTPUTS = 1.1, 2.1, 1.01
_HEAD = """# Costs of RegVar

Measured on {machine}
Float32. Methods run alternately in one process; times are medians of three repeats (six if the spread is above 30 %).
Peak memory is the increase above the imports in a new process. The command of this page is
`python -m benchmarks --select regvar`.

## The mean-absolute regularizer in a custom training loop

Time of an SGD step on 64 rows with `mean_absolute_penalty` in its loss, relative to a plain step; and time of the
variance of `RegularizedPair`, with its checks, relative to one forward pass of {queries} rows. The checks of the
weights do not depend on the number of rows, so that the ratio is larger for fewer rows.

"""
_MEMORY = """
Peak memory of a step with the regularizer exceeds that of a plain step by {slope:.3f} output tensors (the slope of a
line fitted to outputs of {outputs} MiB, with an excess of {extra} MiB; intercept {constant:.1f} MiB; goal ≤ 1, up to
1 %: {reached}).

## Memory of a fit

Peak memory of a `RegVar` fit of K posterior draws, without Rao-Blackwellisation, on an MLP of {n:,} parameters. The
slope of the fitted line is the memory per draw, in vectors of P numbers.

"""
_COST = """
The slopes exceed one vector per draw, which the result needs, because of temporary copies during the fit.

## Cost in N and in P

Seconds of a fit of {draws} draws without Rao-Blackwellisation (whose cost is cubic in the size of the last layer), by
rows at {size:,} parameters and by parameters at {rows} rows; `FineTune` with a fixed number of epochs, `LinearResponse`
with a fixed number of products. The exponent is the slope in logarithms. If the seconds decrease with the size, other
programs disturbed the measurement, and the exponent is meaningless.

"""


def to_markdown(rows: dict[str, Measured]) -> str:
    """Return the text of the page, with the groups that were measured."""
    parts = [_HEAD.format(machine=machine(), queries=step.QUERIES), _steps(rows)]
    if "step-memory" in rows:
        parts.append(_memory(rows))
    if any(name.startswith("exponents") for name in rows):
        parts.append(_exponents(rows))
    return "".join(parts)


def _steps(rows: dict[str, Measured]) -> str:
    header = ("network", "plain step, ms", "with regularizer", "goal", "", "forward, ms", "inference", "goal", "")
    lines = []
    for name, row in _group(rows, "step-", list(step.MODELS)):
        trained, predicted = row["regularized"] / row["plain"], row["inference"] / row["forward"]
        lines.append(
            [
                *(name, f"{row['plain'] * 1e3:.2f}", f"{trained:.3f}", *verdict(trained, _STEP, at_most=True)),
                *(f"{row['forward'] * 1e3:.2f}", f"{predicted:.2f}", *verdict(predicted, _INFERENCE, at_most=True)),
            ]
        )
    return table(header, lines) + "\n"


def _memory(rows: dict[str, Measured]) -> str:
    extra = rows["step-memory"]
    found = _group(rows, "memory-", list(memory.SOLVERS))
    if not found:
        return ""
    header = ("solver", *(f"K = {k}, GiB" for k in found[0][1]["n_draws"]), "slope, P", "at K = 0, GiB", "plain, GiB")
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
    found = _group(rows, "exponents-", list(exponents.SOLVERS))
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


def _group(rows: dict[str, Measured], prefix: str, names: list[str]) -> list[tuple[str, Measured]]:
    """Return the rows of a group by their full names."""
    return [(name, rows[f"{prefix}{i}"]) for i, name in enumerate(names) if f"{prefix}{i}" in rows]
