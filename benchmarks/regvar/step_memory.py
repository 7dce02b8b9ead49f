"""Additional peak memory of a training step with the mean-absolute regularizer, in tensors of outputs."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from bdl_bench.networks.small import mlp
from benchmarks.fresh import in_fresh_process
from benchmarks.records import Measured
from estimators.integrations import mean_absolute_penalty

__all__ = ["measure_step_memory"]

_ROWS, _OUTPUTS = (4096, 8192, 16384), 4096  # a tensor of outputs is 64, 128 and 256 MiB


def measure_step_memory() -> Measured:
    """Return the peak memory in bytes by rows, and the slope of the difference over the bytes of the outputs."""
    plain, regularized = ([in_fresh_process(_step, lam, rows)[1] for rows in _ROWS] for lam in (0.0, 0.1))
    outputs = [4 * rows * _OUTPUTS for rows in _ROWS]
    extra = [more - less for more, less in zip(regularized, plain, strict=True)]
    slope, constant = np.polyfit(outputs, extra, 1)
    return {"plain": plain, "extra": extra, "outputs": outputs, "slope": float(slope), "constant": float(constant)}


def _step(lam: float, rows: int) -> None:
    torch.manual_seed(0)
    model = mlp(64, 256, _OUTPUTS)
    x, y = torch.randn(rows, 64), torch.randint(0, _OUTPUTS, (rows,))
    f = model(x)
    loss = F.cross_entropy(f, y)
    if lam:
        loss = loss + mean_absolute_penalty(f, lam=lam, n_data=rows)
    loss.backward()
