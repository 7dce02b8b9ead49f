"""What every section is made from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bdl_bench.report.figures.canvas import Drawing
from bdl_bench.report.figures.gallery import Gallery, Picture
from bdl_bench.report.palette import Palette
from bdl_bench.report.results import TaskResults

__all__ = ["Context"]


@dataclass(frozen=True)
class Context:
    """The results of one task, with the looks of its methods and where its figures go."""

    results: TaskResults
    palette: Palette
    gallery: Gallery

    def show(self, drawings: Iterable[Drawing | None]) -> list[Picture]:
        """The drawings that there are, as pictures of this task."""
        return self.gallery.show(self.results.name, [d for d in drawings if d is not None])
