"""Memory of the machine, of its container and of this process, and a check before large allocations."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import torch

from estimators.errors import TooLargeError

__all__ = [
    "available_bytes",
    "check_fits_memory",
    "largest_resident_bytes",
    "machine_bytes",
    "reset_peak",
    "resident_bytes",
    "rows_per_chunk",
]

_CGROUP = Path("/sys/fs/cgroup")
_CONTAINER_LIMITS = (_CGROUP / "memory.max", _CGROUP / "memory" / "memory.limit_in_bytes")
"""Memory limits of a container, under version 2 and version 1 of cgroups."""
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def available_bytes(device: torch.device) -> int:
    """Return the free memory of a GPU, or for a CPU the smaller of what the system and the container have free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_field(Path("/proc/meminfo"), "MemAvailable") or _physical_bytes(), _container_bytes())


def _physical_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _field(path: Path, name: str) -> int:
    """Return the bytes of a field in a file of /proc that lists kibibytes; 0 if there is no such file or field."""
    with suppress(OSError):
        for line in path.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


def _container_bytes() -> int:
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return 2**63
    return 2**63 if limit == "max" else max(0, int(limit) - used)


def check_fits_memory(what: str, bytes_needed: int, *, device: torch.device, remedy: str) -> None:
    """Raise TooLargeError if `bytes_needed` exceeds the free memory; nothing is allocated."""
    available = available_bytes(device)
    if bytes_needed > available:
        raise TooLargeError(what, bytes_needed=bytes_needed, bytes_available=available, remedy=remedy)


def rows_per_chunk(bytes_per_row: int, *, budget: int = 2**28) -> int:
    """Return how many rows fit into a memory budget (256 MiB by default); at least one."""
    return max(1, budget // max(1, bytes_per_row))


def machine_bytes() -> int:
    """Return the memory of the machine, or of the container if that is less."""
    sizes = [_physical_bytes()]
    for path in _CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # no container, or "max"
            sizes.append(int(path.read_text()))
    return min(sizes)


def reset_peak() -> bool:
    """Reset the peak of this process's resident memory; return whether the system supports it (Linux, proc(5))."""
    try:
        _CLEAR.write_text("5")
        return resident_bytes(peak=True) > 0
    except OSError:
        return False


def resident_bytes(*, peak: bool = False) -> int:
    """Return the resident memory of this process now, or its peak since the last reset; 0 if unknown."""
    return _field(_STATUS, "VmHWM" if peak else "VmRSS")


def largest_resident_bytes() -> int:
    """Return the largest resident memory that this process ever had."""
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
