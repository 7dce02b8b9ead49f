"""Peak memory of a block of code in this process: reset at its start where the system can, and said where it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from estimators.runtime.memory import largest_resident_bytes, reset_peak, resident_bytes

__all__ = ["PeakMemory", "peak_memory"]


@dataclass
class PeakMemory:
    """Filled when the block ends: peak resident bytes, their rise above the start, and the accelerator's peak."""

    peak_bytes: int = 0
    rise_bytes: int = 0
    reset: bool = False
    device_peak_bytes: int | None = None


@contextmanager
def peak_memory(device: str) -> Iterator[PeakMemory]:
    """Measure the block. Where the peak cannot be reset it is the largest of the process so far (`reset` is False)."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    found = PeakMemory(reset=reset_peak())
    before = resident_bytes() if found.reset else largest_resident_bytes()
    try:
        yield found
    finally:
        found.peak_bytes = resident_bytes(peak=True) if found.reset else largest_resident_bytes()
        found.rise_bytes = max(0, found.peak_bytes - before)
        found.device_peak_bytes = int(torch.cuda.max_memory_allocated(device)) if on_gpu else None
