"""The page docs/benchmarks/serving.md."""

from __future__ import annotations

from benchmarks.machine import machine
from benchmarks.markdown import table
from benchmarks.records import Measured
from benchmarks.serving.measure import N_DRAWS, NETWORKS, SIZES

__all__ = ["to_markdown"]

_HEADER = (
    *("network", "fit", "rows", "network alone, ms", "exported, ms", "ratio", "predict, ms", "largest difference"),
    *("export, s", "file, MB"),
)
_HEAD = """# Latency of exported fits

Measured on {machine}
Float32, one thread, medians of alternating calls. Other programs were running, so the ratios
are more reliable than the milliseconds. The command of this page is `python -m benchmarks --select serving`.

`export` writes a module of torch operations that returns mean, variance and probabilities. `predict` also compares the
derivatives of the query with plain autograd, which the exported module does not. The difference is
max |exported − predict| / max |predict| of the variance. mlp: 64–128–10; cnn: two convolutions, 8×8 images; minilm:
all-MiniLM-L6-v2 (22 million parameters) with a layer of six classes, 16 tokens. Weights do not matter for latency.
draws: {draws} posterior draws. The differences are round-off of float32; in float64 they are below 1e-8
(`tests/estimators/test_export.py`).

If the Jacobian of one row has more than 32 MiB, as for kron and draws of minilm, rows are computed in turn.
Every operation of an exported graph has a fixed cost in Python, which is most of the time of the small networks
here. It is nothing beside a forward pass of minilm.

"""


def to_markdown(rows: dict[str, Measured]) -> str:
    """Return the text of the page."""
    lines = [line for name, row in rows.items() for line in _lines(name, row)]
    return _HEAD.format(machine=machine(), draws=N_DRAWS) + table(_HEADER, lines) + "\n"


def _lines(name: str, row: Measured) -> list[list[str]]:
    network = next(network for network in NETWORKS if name.startswith(f"serving-{network}-"))
    method = name.removeprefix(f"serving-{network}-")
    lines = []
    for n in (size for size in SIZES if str(size) in row):
        found = row[str(n)]
        alone, exported, predict = (1e3 * found[key] for key in ("network", "exported", "predict"))
        cost = [f"{row['export_seconds']:.0f}", f"{row['bytes'] / 1e6:.1f}"]
        times = [f"{alone:.2f}", f"{exported:.2f}", f"{exported / alone:.1f}", f"{predict:.2f}"]
        lines.append([network, method, str(n), *times, f"{found['difference']:.1e}", *cost])
    return lines
