"""The code that produced a record: a digest of the sources that numbers depend on, and versions of packages."""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata
from pathlib import Path

import estimators
from estimators.persistence.checksums import digest

__all__ = ["environment", "source_digest"]

_PACKAGES = (
    *("bdl-bench", "torch", "numpy", "scipy", "scikit-learn", "scoringrules"),
    *("laplace-torch", "backpack-for-pytorch", "curvlinops-for-pytorch", "transformers", "peft"),
)
_EXCLUDED = (
    *("report", "reproduce", "verify", "stats", "cli", "plugins"),
    *(f"runner/{name}" for name in ("executors", "locks.py", "schedule.py", "disk.py", "events.py", "eta.py")),
)
"""Parts of bdl_bench that read records, or decide where and when jobs run: a change there leaves records valid."""


@cache
def source_digest() -> str:
    """Return a digest of the sources of both packages, without `_EXCLUDED`, and of the versions of other packages."""
    versions = " ".join(_version(name) for name in _PACKAGES[1:])
    sources = ("/".join(path.parts[-2:]).encode() + b"\0" + path.read_bytes() for path in _sources())
    return digest(versions, *sources).hex()[:16]


def environment() -> dict[str, str]:
    """Return the versions of the code, of Python and of packages, and the system, by name."""
    versions = {name: _version(name) for name in _PACKAGES}
    return {
        "code": source_digest(),
        "python": platform.python_version(),
        **versions,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _sources() -> list[Path]:
    library = sorted(Path(estimators.__file__).parent.rglob("*.py"))
    root = Path(__file__).parents[1]
    excluded = tuple(root / name for name in _EXCLUDED)
    bench = sorted(p for p in root.rglob("*.py") if not any(p.is_relative_to(part) for part in excluded))
    return [*library, *bench]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
