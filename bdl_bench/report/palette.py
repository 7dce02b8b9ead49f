"""One look a method, the same in every figure: a colour a family, a dash and a marker a member.

Colours are those of Okabe and Ito (2008), which readers with any colour vision tell apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Palette", "Style", "family_of"]

_COLOURS = {
    "the network alone": "#4d5560",
    "Laplace": "#0072B2",
    "last layer": "#3d9bd1",
    "RegVar": "#D55E00",
    "several networks": "#009E73",
    "laplace-torch": "#b3588b",
    "others": "#b87e00",
}
_FAMILIES = (
    ("laplace-torch", "laplace-torch"),
    ("laplace", "Laplace"),
    ("subnetwork", "Laplace"),
    ("last-layer", "last layer"),
    ("regvar", "RegVar"),
    ("map", "the network alone"),
    ("temperature-scaling", "the network alone"),
)
_SEVERAL = ("ensemble", "dropout", "swag")
_DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)), (0, (3, 1)))
_MARKERS = "os^Dv<>P"

Dash = str | tuple[int, tuple[int, ...]]


@dataclass(frozen=True)
class Style:
    """How a method is drawn."""

    family: str
    colour: str
    dash: Dash
    marker: str


class Palette:
    """The styles of the methods of one report, by their order."""

    def __init__(self, methods: Iterable[str]) -> None:
        self._styles: dict[str, Style] = {}
        members: dict[str, int] = {}
        for method in methods:
            family = family_of(method)
            place = members.get(family, 0)
            members[family] = place + 1
            dash, marker = _DASHES[place % len(_DASHES)], _MARKERS[place % len(_MARKERS)]
            self._styles[method] = Style(family, _COLOURS[family], dash, marker)

    def __getitem__(self, method: str) -> Style:
        return self._styles[method]

    def families(self, methods: Iterable[str]) -> dict[str, list[str]]:
        """These methods by family, families in the order of the palette's legend."""
        wanted = list(methods)
        found = {family: [m for m in wanted if self._styles[m].family == family] for family in _COLOURS}
        return {family: members for family, members in found.items() if members}


def family_of(method: str) -> str:
    """The family of a method by its name; "others" for a name that says none."""
    if any(word in method for word in _SEVERAL):
        return "several networks"
    return next((family for prefix, family in _FAMILIES if method.startswith(prefix)), "others")
