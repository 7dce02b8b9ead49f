"""Smaller SVG of Matplotlib: no metadata, rounded coordinates, no fonts; text between tags is unchanged."""

from __future__ import annotations

import re

__all__ = ["minified"]

_PREAMBLE = re.compile(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>|<!--.*?-->", re.DOTALL)
_TAG = re.compile(r"<[^>]*>")
_COORDINATES = re.compile(r' (d|x|y|transform|points|height|width)="([^"]*)"')
_ID = re.compile(r' id="([^"]*)"')
_REFERENCE = re.compile(r"#([\w-]+)")
_STYLE = re.compile(r' style="([^"]*)"')
_FONT = re.compile(r"font-family: ('[^;]*sans-serif)(?:; )?")
_GROUP = re.compile(r"<g>([^<]*(?:<(?!/?g\b)[^<]*)*)</g>")
_NESTED = 6
_NO_TURN = re.compile(r' transform="rotate\(-?0 [^"]*\)"')


def minified(svg: str) -> str:
    """Return the same picture in fewer characters."""
    text = _PREAMBLE.sub("", svg)
    referenced = set(_REFERENCE.findall(text))

    def tag(found: re.Match[str]) -> str:
        return _tag(found[0], referenced)

    text = re.sub(r">\s+<", "><", _TAG.sub(tag, text)).strip()
    for _ in range(_NESTED):
        text = _GROUP.sub(r"\1", text)
    return text


def _tag(tag: str, referenced: set[str]) -> str:
    """Shorten one tag. Single quotes need no escape in the page; without fonts, no value contains one."""
    tag = _ID.sub(lambda found: found[0] if found[1] in referenced else "", tag)
    tag = _COORDINATES.sub(_shorter, _NO_TURN.sub("", tag))
    tag = _STYLE.sub(lambda found: f' style="{_tight(_FONT.sub("", found[1]))}"', tag)
    return tag if "'" in tag else tag.replace('"', "'")


def _shorter(found: re.Match[str]) -> str:
    """Round to a tenth of a point from ten points on, else to a hundredth; drop spaces around the letters of a path."""
    value = re.sub(r"(\d\d\.\d)\d+", r"\1", found[2].replace("\n", " "))
    value = re.sub(r"(\d\.\d\d)\d+", r"\1", value)
    if found[1] == "d":
        value = re.sub(r" *([MLCQHVZz]) *", r"\1", value)
    return f' {found[1]}="{value}"'


def _tight(style: str) -> str:
    return style.replace("; ", ";").replace(": ", ":")
