"""The data's curvature over the rows of two data sets, for forms that are sums over rows."""

from __future__ import annotations

from dataclasses import replace

import torch

from estimators.curvature.forms import DataCurvature, DenseCurvature, FactoredCurvature, JacobianCurvature
from estimators.curvature.layerwise.blocks import Blocks
from estimators.curvature.layerwise.factored_rows import FactoredRows
from estimators.errors import UnsupportedError

__all__ = ["joined_curvature", "not_a_sum"]


def joined_curvature(first: DataCurvature, other: DataCurvature) -> DataCurvature:
    """Return the data's curvature over the rows of both, of the same form at the same weights.

    Raises:
        UnsupportedError: for a form that is not a sum over rows.
    """
    if isinstance(first, DenseCurvature) and isinstance(other, DenseCurvature):
        return replace(first, matrix=first.matrix + other.matrix)
    if isinstance(first, JacobianCurvature) and isinstance(other, JacobianCurvature):
        return JacobianCurvature(torch.cat([first.rows, other.rows]))
    if isinstance(first, FactoredCurvature) and isinstance(other, FactoredCurvature):
        return FactoredCurvature(_joined_rows(first.rows, other.rows))
    if isinstance(first, Blocks) and isinstance(other, Blocks) and first.maps == other.maps:
        bases = [block.input_basis for block in (*first.blocks.values(), *other.blocks.values())]
        if all(basis is None for basis in bases):
            blocks = {
                name: replace(block, eigenvalues=block.eigenvalues + other.blocks[name].eigenvalues)
                for name, block in first.blocks.items()
            }
            return replace(first, blocks=blocks, other_diagonal=first.other_diagonal + other.other_diagonal)
    raise not_a_sum(type(first).__name__)


def _joined_rows(first: FactoredRows, other: FactoredRows) -> FactoredRows:
    if first.layout.maps != other.layout.maps or first.shape[1] != other.shape[1]:
        raise not_a_sum("rows that use other layers than those of the fit")
    inputs = {name: torch.cat([a, other.inputs[name]]) for name, a in first.inputs.items()}
    gradients = {name: torch.cat([b, other.gradients[name]]) for name, b in first.gradients.items()}
    return replace(
        first, inputs=inputs, gradients=gradients, other_rows=torch.cat([first.other_rows, other.other_rows])
    )


def not_a_sum(received: str) -> UnsupportedError:
    """Return the error for a curvature that cannot be updated."""
    return UnsupportedError(
        "a curvature that is a sum over rows, to which the new rows can be added",
        received=received,
        remedy='hessian_structure="full" with inverse="cholesky" or "dual", or "diag"; or fit again on all rows.',
    )
