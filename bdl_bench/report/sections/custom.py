"""Sections of plugins: their text, table and figures, or the error that they raised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bdl_bench.plugins import SECTIONS, PluginError, Section
from bdl_bench.report.figures.canvas import Drawing
from bdl_bench.report.figures.gallery import Picture
from bdl_bench.report.formatting import number
from bdl_bench.report.sections.context import Context

__all__ = ["CustomSection", "custom_sections"]


@dataclass(frozen=True)
class CustomSection:
    """A section of a plugin with its entries as text; `error` is the reason why there is none."""

    template: ClassVar[str] = "custom.html"
    title: str
    text: list[str]
    header: list[str]
    rows: list[list[str]]
    pictures: list[Picture]
    error: str | None = None


def custom_sections(context: Context) -> list[CustomSection]:
    """Return the sections that plugins add to a task. One that raises is shown with its error."""
    found = [_section(context, name) for name in SECTIONS]
    return [section for section in found if section is not None]


def _section(context: Context, name: str) -> CustomSection | None:
    try:
        made = SECTIONS[name](context.results)
        return None if made is None else _shown(context, name, made)
    except Exception as error:
        return CustomSection(name, [], [], [], [], f"{type(error).__name__}: {error}")


def _shown(context: Context, name: str, made: Section) -> CustomSection:
    if not isinstance(made, Section) or any(len(row) != len(made.header) for row in made.rows):
        raise PluginError(
            "a bdl_bench.plugins.Section, each row as long as the header",
            received=f"a {type(made).__name__}",
            remedy="return Section(title, text, header, rows).",
        )
    rows = [[entry if isinstance(entry, str) else number(float(entry)) for entry in row] for row in made.rows]
    figures = enumerate(made.figures.items())
    drawings = [Drawing(f"{name} {i}", caption, caption, figure) for i, (caption, figure) in figures]
    return CustomSection(made.title, list(made.text), list(made.header), rows, context.render(drawings))
