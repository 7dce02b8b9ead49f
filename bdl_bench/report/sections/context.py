"""The input of every section."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bdl_bench.report.figures.canvas import Drawing
from bdl_bench.report.figures.gallery import Gallery, Picture
from bdl_bench.report.palette import Palette
from bdl_bench.report.results import TaskResults
from bdl_bench.report.seed_design import SeedDesign

__all__ = ["Context"]


@dataclass(frozen=True)
class Context:
    """The results of one task, how its seeds differ, the styles of its methods, and the gallery of its figures."""

    results: TaskResults
    design: SeedDesign
    palette: Palette
    gallery: Gallery

    def render(self, drawings: Iterable[Drawing | None]) -> list[Picture]:
        """Render the drawings that are not None as pictures of this task."""
        return self.gallery.render(self.results.name, [d for d in drawings if d is not None])
