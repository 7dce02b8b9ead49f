"""Prints the section of CHANGELOG.md that belongs to a tag, after checking that every file has its version.

Usage: python tools/release_notes.py v0.2.0
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main(tag: str) -> str:
    """Return the release notes of a tag.

    Args:
        tag: "v" and the version, as git has it.

    Returns:
        The text of the changelog's section, without its heading.

    Raises:
        SystemExit: pyproject.toml or CITATION.cff has another version, or the changelog no dated section.
    """
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    if tag != f"v{version}":
        sys.exit(f"Expected the tag v{version}, of the version in pyproject.toml. Received {tag}.")
    if f"\nversion: {version}\n" not in (ROOT / "CITATION.cff").read_text(encoding="utf-8"):
        sys.exit(f"Expected version: {version} in CITATION.cff, as in pyproject.toml.")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    section = re.search(
        rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL
    )
    if section is None:
        sys.exit(f"Expected a heading `## [{version}] - YYYY-MM-DD` in CHANGELOG.md.")
    return section[1].strip()


if __name__ == "__main__":
    print(main(sys.argv[1]))
