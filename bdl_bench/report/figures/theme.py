"""The font and the colours of figures in the page: those of the page, light or dark as the reader prefers.

An SVG in an <img> element cannot read the styles of the page, so it has its own: each colour is a variable, with
another value in the dark. Files of figures keep the light colours and the font of Matplotlib.
"""

from __future__ import annotations

import re

from bdl_bench.report.figures.canvas import BAD, GUIDE, INK, PAPER, SOFT
from bdl_bench.report.palette import DARK

__all__ = ["FONT", "themed"]

FONT = '-apple-system,BlinkMacSystemFont,"Segoe UI",Roboto,"Helvetica Neue","Noto Sans",Arial,sans-serif'
"""The font of the page, as in CSS."""
_DARK = {
    INK: "#c8d0d9", SOFT: "#7d8793", GUIDE: "#454f5b", BAD: "#ff8076", PAPER: "#14181d",
    **{light.lower(): dark for light, dark in DARK.items()},
}  # fmt: skip
_COLOUR = re.compile("|".join(_DARK))
_STYLE = re.compile(r" style=('[^']*'|\"[^\"]*\")")


def themed(svg: str) -> str:
    """Return a minified SVG with the font of the page, and with colours that are lighter on a dark page.

    Args:
        svg: with a <style> element, as Matplotlib and `minified` write it.

    Returns:
        The same picture.
    """
    used: dict[str, str] = {}

    def variable(found: re.Match[str]) -> str:
        return f"var(--{used.setdefault(found[0], f'c{len(used)}')})"

    text = _STYLE.sub(lambda style: _COLOUR.sub(variable, style[0]), svg)
    light = ";".join(f"--{name}:{colour}" for colour, name in used.items())
    dark = ";".join(f"--{name}:{_DARK[colour]}" for colour, name in used.items())
    rules = f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}" if used else ""
    return text.replace("</style>", f"{rules}text{{font-family:{FONT}}}</style>", 1)
