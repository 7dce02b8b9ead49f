"""Correction of p-values for the number of comparisons."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["holm"]


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's (1979) step-down correction: adjusted p-values, which control the chance of any false finding.

    p̃₍ᵢ₎ = max over j <= i of min(1, (m − j + 1) p₍ⱼ₎),  p₍₁₎ <= ... <= p₍ₘ₎
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}
