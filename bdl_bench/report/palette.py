"""The style of each method, the same in every figure: a colour per family, a dash and a marker per member.

The colours are those of Okabe and Ito (2008), which are distinct for readers with any colour vision.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["DARK", "Palette", "Style", "family_of"]

_COLOURS = {
    "single network": "#4d5560",
    "Laplace": "#0072B2",
    "last-layer Laplace": "#3d9bd1",
    "RegVar": "#D55E00",
    "ensembles": "#009E73",
    "laplace-torch": "#b3588b",
    "others": "#b87e00",
}
DARK = {
    "#4d5560": "#b4bdc8",
    "#0072B2": "#56b4f0",
    "#3d9bd1": "#9ad6f7",
    "#D55E00": "#ff9a52",
    "#009E73": "#3fd0a3",
    "#b3588b": "#e79ac7",
    "#b87e00": "#e8b652",
}
"""The colour of each family on a dark page."""
_FAMILIES = (
    ("laplace-torch", "laplace-torch"),
    ("laplace", "Laplace"),
    ("subnetwork", "Laplace"),
    ("last-layer", "last-layer Laplace"),
    ("regvar", "RegVar"),
    ("map", "single network"),
    ("temperature-scaling", "single network"),
)
_ENSEMBLES = ("ensemble", "dropout", "swag")
_DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)), (0, (3, 1)))
_MARKERS = "os^Dv<>P"

Dash = str | tuple[int, tuple[int, ...]]


@dataclass(frozen=True)
class Style:
    """Colour, dash and marker of a method."""

    family: str
    colour: str
    dash: Dash
    marker: str


class Palette:
    """The styles of the methods of one report, assigned by their order."""

    def __init__(self, methods: Iterable[str]) -> None:
        self._styles: dict[str, Style] = {}
        members: dict[str, int] = {}
        for method in methods:
            family = family_of(method)
            index = members.get(family, 0)
            members[family] = index + 1
            dash, marker = _DASHES[index % len(_DASHES)], _MARKERS[index % len(_MARKERS)]
            self._styles[method] = Style(family, _COLOURS[family], dash, marker)

    def __getitem__(self, method: str) -> Style:
        return self._styles[method]

    def families(self, methods: Iterable[str]) -> dict[str, list[str]]:
        """Return these methods by family, in the order of the colours."""
        wanted = list(methods)
        found = {family: [m for m in wanted if self._styles[m].family == family] for family in _COLOURS}
        return {family: members for family, members in found.items() if members}


def family_of(method: str) -> str:
    """Return the family of a method by its name, "others" for an unknown name."""
    if any(word in method for word in _ENSEMBLES):
        return "ensembles"
    return next((family for prefix, family in _FAMILIES if method.startswith(prefix)), "others")
