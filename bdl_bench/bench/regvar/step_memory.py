"""Peak memory of a training step with the term above that of a plain one, in tensors of outputs."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from bdl_bench.bench.fresh import in_fresh_process
from bdl_bench.bench.records import Measured
from bdl_bench.networks.small import mlp
from estimators.integrations import mean_absolute_penalty

__all__ = ["measure_step_memory"]

_ROWS, _OUTPUTS = 8192, 4096  # one tensor of outputs is 128 MiB


def measure_step_memory() -> Measured:
    """Rises of the peak in bytes, and their difference over the bytes of the outputs."""
    plain, regularized = (in_fresh_process(_step, lam)[1] for lam in (0.0, 0.1))
    outputs = 4 * _ROWS * _OUTPUTS
    return {"plain": plain, "regularized": regularized, "outputs": outputs, "extra": (regularized - plain) / outputs}


def _step(lam: float) -> None:
    torch.manual_seed(0)
    model = mlp(64, 256, _OUTPUTS)
    x, y = torch.randn(_ROWS, 64), torch.randint(0, _OUTPUTS, (_ROWS,))
    f = model(x)
    loss = F.cross_entropy(f, y)
    if lam:
        loss = loss + mean_absolute_penalty(f, lam=lam, n_data=_ROWS)
    loss.backward()
