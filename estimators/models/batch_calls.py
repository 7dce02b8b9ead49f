"""Trace the calls of linear maps and norms in the forward of a whole batch, with the rows of each call.

Which dimension of a call has the rows is found from the shape that the same call has for one row. A norm with a scale
γ and a shift β is y = γ x̂ + β, so that the gradients of a row are Σ b x̂ and Σ b over its positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F

from estimators.models.convolution_calls import ConvolutionPatches
from estimators.models.linear_calls import CallInputs, LinearCall, LinearCallTracer, LinearMap, rows_first

__all__ = ["NORMS", "BatchCallTracer", "BatchLinearCall", "BatchNormCall"]


@dataclass(frozen=True)
class BatchLinearCall:
    """One call of a linear map on a batch.

    Attributes:
        map: the linear map.
        inputs: the inputs of B rows.
        n_rows: B.
        row_dim: the dimension of the output that has the rows, as `rows_first` takes it.
        channels_last: whether the last dimension of the output has its channels; else the second one has.
        edge: where the gradient by the output is found; None if the output has no graph.
    """

    map: LinearMap
    inputs: CallInputs
    n_rows: int
    row_dim: int | None
    channels_last: bool
    edge: GradientEdge | None

    def by_position(self, gradient: Tensor) -> Tensor:
        """A gradient by the output of the call as (B, T, O)."""
        if self.channels_last:
            return rows_first(gradient, self.n_rows, self.row_dim)
        return gradient.flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class BatchNormCall:
    """One call of a norm on a batch.

    Attributes:
        scale: name of the chosen parameter γ; None if it is not chosen.
        shift: name of the chosen parameter β; None if it is not chosen.
        normalized: makes x̂, in the shape of the output.
        n_last: how many last dimensions γ and β have; None if they have the second of more than two.
        n_rows: B.
        row_dim: the dimension of the output that has the rows, as `rows_first` takes it.
        edge: where the gradient by the output is found; None if the output has no graph.
    """

    scale: str | None
    shift: str | None
    normalized: Callable[[], Tensor]
    n_last: int | None
    n_rows: int
    row_dim: int | None
    edge: GradientEdge | None

    def rows(self, gradient: Tensor) -> dict[str, Tensor]:
        """The gradients of each row, (B, entries of the parameter), by name, from the gradient by the output."""
        found = {}
        if self.shift is not None:
            found[self.shift] = self._summed(gradient)
        if self.scale is not None:
            found[self.scale] = self._summed(gradient * self.normalized())
        return found

    def _summed(self, values: Tensor) -> Tensor:
        """Sum values in the shape of the output over the positions of each row."""
        if self.n_last is None:
            return values.flatten(2).sum(2)
        return rows_first(values.flatten(-self.n_last), self.n_rows, self.row_dim).sum(1)


@dataclass(frozen=True)
class _LinearRecord:
    """A linear call as it was made: its map, its inputs, and the shape and the gradient edge of its output."""

    map: LinearMap
    inputs: CallInputs
    space: int | None
    shape: torch.Size
    edge: GradientEdge | None


class BatchCallTracer(LinearCallTracer):
    """A mode that records the linear calls and the norms in the forward of a batch.

    Args:
        parameters: the chosen parameters, by name.

    Attributes:
        other_uses: names of parameters that are used in other ways than these.
    """

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        super().__init__(parameters)
        self._linear: list[_LinearRecord] = []
        self._norms: list[tuple[BatchNormCall, torch.Size]] = []

    def linear_calls(
        self, n_rows: int, of_one_row: Sequence[LinearCall], *, positions_first: bool
    ) -> list[BatchLinearCall] | None:
        """The linear calls with their rows, if those of one row were the same; else None.

        Args:
            n_rows: B.
            of_one_row: the calls of one row.
            positions_first: whether calls with the positions of all rows in one dimension have position after position.
        """
        if [record.map for record in self._linear] != [call.map for call in of_one_row]:
            return None
        found: list[BatchLinearCall] = []
        dim: int | None
        for record, call in zip(self._linear, of_one_row, strict=True):
            dims = _row_dims(call.output_shape, record.shape, n_rows)
            inputs = replace(record.inputs, input=record.inputs.input.detach())
            if isinstance(inputs, ConvolutionPatches):
                dim = 0
                if 0 not in dims or inputs.input.shape[0] != n_rows or inputs.input.ndim != inputs.weight.ndim:
                    return None
            elif dims:
                dim = dims[-1] if positions_first else dims[0]
                inputs = inputs.by_row(n_rows, dim)
            else:
                return None
            found.append(BatchLinearCall(record.map, inputs, n_rows, dim, record.space is None, record.edge))
        return found

    def norm_calls(self, n_rows: int, *, positions_first: bool) -> list[BatchNormCall] | None:
        """The norms with their rows, if these are found; else None."""
        found = []
        for call, shape in self._norms:
            leading = shape[:1] if call.n_last is None else shape[: -call.n_last]
            dims: list[int | None] = [dim for dim, size in enumerate(leading) if size == n_rows]
            if not dims and (call.n_last is None or len(leading) != 1 or shape[0] % n_rows):
                return None
            dim = dims[0] if dims else None if positions_first else 0
            found.append(replace(call, n_rows=n_rows, row_dim=dim))
        return found

    def _record(self, linear_use: tuple[LinearMap, CallInputs, int | None], result: Tensor) -> Tensor:
        linear, inputs, space = linear_use
        self._linear.append(_LinearRecord(linear, inputs, space, result.shape, _edge(result)))
        return result

    def _record_other(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: object
    ) -> None:
        call = self._norm(func, args, kwargs, result) if func in NORMS and isinstance(result, Tensor) else None
        known = () if call is None else [name for name in (call.scale, call.shift) if name is not None]
        if known and call is not None and isinstance(result, Tensor):
            self._norms.append((call, result.shape))
        self._record_other_uses(func, known, args, kwargs, result)

    def _norm(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor
    ) -> BatchNormCall | None:
        """A call of a norm; None if it uses statistics of the batch."""
        bound = _signature(func).bind(*args, **kwargs).arguments
        if bound.get("training"):
            return None
        plain = {name: value for name, value in bound.items() if name not in ("weight", "bias")}
        plain = {name: value.detach() if isinstance(value, Tensor) else value for name, value in plain.items()}
        shape = bound.get("normalized_shape")
        n_last = len(shape) if shape is not None else 1 if result.ndim == 2 else None
        return BatchNormCall(
            self._name_of(bound.get("weight")),
            self._name_of(bound.get("bias")),
            lambda: func(**plain),
            n_last,
            0,
            0,
            _edge(result),
        )


NORMS: set[Callable[..., Any]] = {F.batch_norm, F.layer_norm, F.group_norm, F.rms_norm}
"""Functions y = γ x̂ + β of an input that they normalise."""


_signature = cache(inspect.signature)


def _edge(result: Tensor) -> GradientEdge | None:
    """Where the gradient by a result is found, even if it is changed in place later."""
    return get_gradient_edge(result) if result.requires_grad else None


def _row_dims(of_one: torch.Size, of_all: torch.Size, n_rows: int) -> list[int | None]:
    """What `rows_first` may take as the dimension of the rows of a call, whose output for one row is `of_one`.

    There are two possibilities if the first dimension has the positions of all rows.
    """
    if len(of_one) != len(of_all) or not of_one:
        return []
    for dim, size in enumerate(of_one):
        if size == 1 and of_all == torch.Size([*of_one[:dim], n_rows, *of_one[dim + 1 :]]):
            return [dim]
    if of_one[1:] == of_all[1:] and of_all[0] == n_rows * of_one[0]:
        return [0, None] if len(of_one) == 2 else [0]
    return []
