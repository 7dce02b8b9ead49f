"""How much memory there is, and a refusal before an allocation that would not fit."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from estimators.errors import TooLargeError

__all__ = ["available_bytes", "check_fits_memory", "rows_per_chunk"]

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int:
    """Free memory of the device: the GPU's own figure, or the least of the system's and the container's for a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_system_bytes(), _container_bytes())


def _system_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _container_bytes() -> int:
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return 2**63
    return 2**63 if limit == "max" else max(0, int(limit) - used)


def check_fits_memory(what: str, bytes_needed: int, *, device: torch.device, remedy: str) -> None:
    """Raise TooLargeError where `bytes_needed` exceeds the free memory; nothing is allocated before."""
    available = available_bytes(device)
    if bytes_needed > available:
        raise TooLargeError(what, bytes_needed=bytes_needed, bytes_available=available, remedy=remedy)


def rows_per_chunk(bytes_a_row: int, *, budget: int = 2**28) -> int:
    """How many rows of work fit into a budget (256 MiB by default); at least one."""
    return max(1, budget // max(1, bytes_a_row))
