"""Peak memory of a block of code in this process, and whether the system could reset the peak at its start."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["PeakMemory", "peak_memory"]

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


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
    found = PeakMemory(reset=_reset_peak())
    before = _resident("VmRSS") if found.reset else _largest_so_far()
    try:
        yield found
    finally:
        found.peak_bytes = _resident("VmHWM") if found.reset else _largest_so_far()
        found.increase_bytes = max(0, found.peak_bytes - before)
        found.device_peak_bytes = int(torch.cuda.max_memory_allocated(device)) if on_gpu else None


def _reset_peak() -> bool:
    """Reset the peak to the current resident memory; return False if the system cannot (Linux: proc(5), clear_refs)."""
    try:
        _CLEAR.write_text("5")
        return _resident("VmHWM") > 0
    except OSError:
        return False


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def _largest_so_far() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
