"""The machine and the versions of a measurement, in one sentence."""

from __future__ import annotations

import os
import platform

from bdl_bench.records.versions import environment
from estimators.runtime.memory import machine_bytes

__all__ = ["machine"]


def machine() -> str:
    """Return, for example, "2 cores, 24 GiB, x86_64, one thread; torch ..."."""
    versions = environment()
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "python"))
    system = f"{os.cpu_count()} cores, {machine_bytes() / 2**30:.0f} GiB, {platform.machine()}"
    return f"{system}, one thread; {named}; page written by code {versions['code']}."
