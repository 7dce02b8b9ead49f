"""The arrays of a record by set of rows.

The layout is flat. Test rows have plain names, other sets a prefix, and the arrays of the tuned estimator one more:

    mean, epistemic_variance, total_variance | probs, targets
    validation/<name>    ood/<set>/<name>    shift/<family>-<severity>/<name>    decision/<name>
    tuned/<any of these>

`decision/` holds the curves of a decision, not rows: they have an entry per round or level, and are not tuned.
`plot_grid/` and `train/` hold rows that figures draw and no metric scores. They belong to no part.
Out-of-distribution rows may have no targets. Targets are stored once: if the tuned arrays of a set have none, those of
the untuned estimator apply, as do its inputs and row identities.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from estimators.errors import DataError

__all__ = ["Parts", "flattened", "parts", "tuned"]

Array = NDArray[np.float64]
Named = Mapping[str, Array]
T = TypeVar("T")
_TUNED = "tuned/"
_SHARED = ("targets", "x", "row_id")
"""Arrays that tuning does not change, so that a record stores them once."""
_NOT_SCORED = ("tuned", "plot_grid", "train")


@dataclass(frozen=True)
class Parts:
    """Arrays by name of each set of rows.

    Args:
        test: of the test rows.
        validation: of the validation rows; empty if these were not stored.
        ood: of each out-of-distribution set, by its name.
        shift: of each shifted set, by its name.
        decision: curves of a decision, by their names; empty if the task has none.
    """

    test: Named
    validation: Named = field(default_factory=dict)
    ood: Mapping[str, Named] = field(default_factory=dict)
    shift: Mapping[str, Named] = field(default_factory=dict)
    decision: Named = field(default_factory=dict)


def parts(arrays: Named) -> Parts:
    """Return the arrays of the untuned estimator by set of rows.

    Args:
        arrays: the arrays of a record, in the layout of this module.

    Returns:
        The sets of rows.

    Raises:
        DataError: for a name that is not in the layout.
    """
    test: dict[str, Array] = {}
    named: dict[str, dict[str, Array]] = {"validation": {}, "decision": {}}
    sets: dict[str, dict[str, dict[str, Array]]] = {"ood": {}, "shift": {}}
    for path, array in arrays.items():
        section, _, rest = path.partition("/")
        group, _, name = rest.rpartition("/")
        if not rest:
            test[path] = array
        elif section in named and not group:
            named[section][name] = array
        elif section in sets and group and name:
            sets[section].setdefault(group, {})[name] = array
        elif section not in _NOT_SCORED:
            raise DataError(
                "arrays named <name>, validation/<name>, decision/<name>, ood/<set>/<name>, shift/<set>/<name>, or "
                "tuned/<any of these>",
                received=path,
                remedy="make the names with bdl_bench.metrics.flattened.",
            )
    return Parts(test, named["validation"], sets["ood"], sets["shift"], named["decision"])


def tuned(arrays: Mapping[str, T]) -> dict[str, T]:
    """Return the arrays of the tuned estimator under the names of those of the untuned one.

    Args:
        arrays: the arrays of a record by name, in the layout of this module; or anything else by these names.

    Returns:
        Arrays by name, with those of the untuned estimator that tuning does not change; empty if nothing was tuned.
    """
    found = {path.removeprefix(_TUNED): array for path, array in arrays.items() if path.startswith(_TUNED)}
    filled = {path.rpartition("/")[0] for path in found}
    for path, array in arrays.items():
        group, _, name = path.rpartition("/")
        if name in _SHARED and group in filled:
            found.setdefault(path, array)
    return found


def flattened(split: Parts, *, prefix: str = "") -> dict[str, Array]:
    """Return the arrays of these sets in the flat layout, the inverse of `parts`.

    Args:
        split: the sets of rows.
        prefix: "tuned/" for arrays of the tuned estimator.

    Returns:
        Arrays by name.
    """
    named: dict[str, Named] = {"": split.test, "validation/": split.validation, "decision/": split.decision}
    for section, sets in (("ood", split.ood), ("shift", split.shift)):
        named |= {f"{section}/{name}/": arrays for name, arrays in sets.items()}
    return {f"{prefix}{group}{name}": array for group, arrays in named.items() for name, array in arrays.items()}
