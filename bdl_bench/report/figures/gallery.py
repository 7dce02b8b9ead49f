"""Figures as data URIs of <img> elements, and as files on request.

The page loads nothing, and an image in <img> cannot run a script.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from bdl_bench.report.figures.canvas import Drawing, styled
from bdl_bench.report.figures.minify import minified
from bdl_bench.report.figures.theme import themed
from estimators.errors import OptionError
from estimators.persistence.atomic import write_bytes

__all__ = ["Gallery", "Picture"]

_PLAIN = " !$'()*+,-./:;=?@[]^_|~"
_ESCAPES = {code: quote(chr(code), safe=_PLAIN) for code in range(128) if quote(chr(code), safe=_PLAIN) != chr(code)}
_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]+")


@dataclass(frozen=True)
class Picture:
    """An image with its caption and its description in words."""

    title: str
    address: Markup
    description: str


@dataclass(frozen=True)
class Gallery:
    """Renders drawings; with `files`, each is also saved as `directory/<folder>/<name>.<files>`.

    File names have letters, digits and dashes only. Two names that differ in other characters get a number.
    """

    directory: Path | None = None
    files: str | None = None
    _taken: dict[tuple[str, ...], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.files not in (None, "svg", "pdf"):
            raise OptionError(
                'figures="svg", figures="pdf" or None', received=repr(self.files), remedy="choose one of these."
            )

    def render(self, folder: str, drawings: Iterable[Drawing]) -> list[Picture]:
        """Return each drawing as a picture of the page."""
        return [self._picture(folder, drawing) for drawing in drawings]

    def _picture(self, folder: str, drawing: Drawing) -> Picture:
        if self.directory is not None and self.files is not None:
            path_names = self._named(folder), self._named(folder, drawing.name)
            path = self.directory / path_names[0] / f"{path_names[1]}.{self.files}"
            with styled(), rc_context({"svg.fonttype": "path"}):
                write_bytes(path, _saved(drawing.figure, self.files))
        return Picture(drawing.title, _address(drawing.figure), drawing.description)

    def _named(self, *names: str) -> str:
        """Return a file name for the last of these names, the same at each call and another one for other names."""
        if names not in self._taken:
            plain = re.sub(r"[^A-Za-z0-9]+", "-", names[-1]).strip("-").lower()[:60].strip("-") or "figure"
            siblings = {name for key, name in self._taken.items() if key[:-1] == names[:-1]}
            numbered = (plain if i == 1 else f"{plain}-{i}" for i in count(1))
            self._taken[names] = next(name for name in numbered if name not in siblings)
        return self._taken[names]


def _address(figure: Figure) -> Markup:
    """Return a percent-encoded SVG, with text as text, in the font and the light or dark colours of the page."""
    text = themed(minified(_saved(figure, "svg").decode())).translate(_ESCAPES)
    # Markup: no character is left that ends an attribute in double quotes, so the page must not escape it again.
    return Markup("data:image/svg+xml," + _BEYOND_ASCII.sub(lambda found: quote(found[0]), text))


def _saved(figure: Figure, form: str) -> bytes:
    buffer = io.BytesIO()
    dates = {"Date": None, "Creator": None} if form == "svg" else {"CreationDate": None}
    with styled():
        figure.savefig(buffer, format=form, transparent=form == "svg", metadata=dates)
    return buffer.getvalue()
