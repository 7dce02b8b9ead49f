"""Peak memory of a block of code in this process, and whether the system could reset the peak at its start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from estimators.runtime.memory import largest_resident_bytes, reset_peak, resident_bytes

__all__ = ["PeakMemory", "peak_memory"]


@dataclass
class PeakMemory:
    """Peak memory in bytes, set when the block ends.

    Attributes:
        peak_bytes: peak resident memory.
        increase_bytes: increase in resident memory, from the start of the block to the peak.
        reset: whether the peak was reset at the start; if not, `peak_bytes` is the largest of the process so far.
        device_peak_bytes: peak memory of the accelerator; None on the CPU.
    """

    peak_bytes: int = 0
    increase_bytes: int = 0
    reset: bool = False
    device_peak_bytes: int | None = None


@contextmanager
def peak_memory(device: str) -> Iterator[PeakMemory]:
    """Measure the peak memory of the block on this machine and on the device."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    found = PeakMemory(reset=reset_peak())
    before = resident_bytes() if found.reset else largest_resident_bytes()
    try:
        yield found
    finally:
        found.peak_bytes = resident_bytes(peak=True) if found.reset else largest_resident_bytes()
        found.increase_bytes = max(0, found.peak_bytes - before)
        found.device_peak_bytes = int(torch.cuda.max_memory_allocated(device)) if on_gpu else None
