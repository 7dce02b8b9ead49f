"""Suggestions for misspelt names."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["did_you_mean"]

_MOST = 3
_SIMILARITY = 0.55
"""Ratio of `difflib.SequenceMatcher` from which on a name is suggested: "laplce" and "laplace" have 0.92."""


def did_you_mean(name: str, names: Iterable[str], otherwise: str) -> str:
    """Return a question with the names that are spelt like this one.

    Args:
        name: what was received.
        names: those that exist. Upper and lower case count as equal.
        otherwise: what to return if no name is similar, and what follows the question.

    Returns:
        The question and `otherwise`, for the remedy of an error.

    Example:
        >>> did_you_mean("laplce", ["laplace", "map", "laplace-kron"], "bdl-bench list shows all.")
        'did you mean laplace or laplace-kron? bdl-bench list shows all.'
    """
    by_lower = {found.lower(): found for found in names}
    close = get_close_matches(name.lower(), by_lower, n=_MOST, cutoff=_SIMILARITY)
    if not close:
        return otherwise
    found = [by_lower[key] for key in close]
    listed = " or ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)
    return f"did you mean {listed}? {otherwise}"
