"""Trace every call that uses a chosen parameter as the weight of a linear map, in any module or function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from estimators.models.convolution_calls import CONVOLUTIONS, ConvolutionPatches
from estimators.numerics.pytrees import tensors_of

__all__ = ["CallInputs", "LinearCall", "LinearCallTracer", "LinearMap", "VectorInputs", "rows_first"]


@dataclass(frozen=True)
class LinearMap:
    """A weight as a matrix (O, D), with its bias if both are chosen.

    Attributes:
        weight: name of the weight.
        bias: name of the bias; None if there is none, or it is not chosen.
        n_outputs: O.
        n_inputs: D.
        transposed: whether the weight is stored as (D, O), or as (D/k, O, k) for a transposed convolution.
        n_kernel: k, the number of entries of the kernel of a transposed convolution.
    """

    weight: str
    bias: str | None
    n_outputs: int
    n_inputs: int
    transposed: bool = False
    n_kernel: int = 1

    @property
    def names(self) -> list[str]:
        """The names of the parameters, weight first."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def shape(self) -> tuple[int, int]:
        """(O, E) with E = D, or D + 1 with the bias as the last column."""
        return self.n_outputs, self.n_inputs + (self.bias is not None)


@dataclass(frozen=True)
class VectorInputs:
    """Inputs (..., D) of one call that applies a matrix to their last dimension."""

    input: Tensor

    def positions(self) -> Tensor:
        """The inputs (T, D), T counting all positions of the call."""
        return self.input.reshape(-1, self.input.shape[-1])

    def by_row(self, n_rows: int, dim: int | None) -> VectorInputs:
        """The inputs as (B, T, D), by `rows_first`."""
        return VectorInputs(rows_first(self.input, n_rows, dim))

    def of_rows(self, rows: slice | Tensor) -> Tensor:
        """The inputs (M, T, D) at the positions of some of the rows, after `by_row`."""
        return self.input[rows]

    def summed(self) -> Tensor:
        """The sum of the inputs over the positions of each row, (B, D), after `by_row`."""
        return self.input.sum(1)

    def products(self, vectors: Tensor) -> Tensor:
        """The products with vectors (n, D) of the inputs at every position of each row, (B, T, n), after `by_row`."""
        return self.input @ vectors.T


def rows_first(tensor: Tensor, n_rows: int, dim: int | None) -> Tensor:
    """A tensor (..., D) as (B, T, D).

    Args:
        tensor: (..., D), or (positions of all rows, D).
        n_rows: B.
        dim: the dimension that has the rows; 0 also if it has the T positions of row after row. None if it has the rows
            of position after position, as in attention.
    """
    if dim is None:
        return tensor.reshape(-1, n_rows, tensor.shape[-1]).transpose(0, 1)
    return tensor.movedim(dim, 0).reshape(n_rows, -1, tensor.shape[-1])


CallInputs = VectorInputs | ConvolutionPatches
"""Inputs of one call of a linear map, whose `positions()` are (T, D)."""


@dataclass(frozen=True)
class LinearCall:
    """One call of a linear map on one row.

    Attributes:
        map: the linear map.
        inputs: (T, D), one row per position that the weight is applied to.
        output_shape: the shape of the output of the call.
        space: how many dimensions come after the channels in `output_shape`; None if the channels are last.
    """

    map: LinearMap
    inputs: Tensor
    output_shape: torch.Size
    space: int | None

    def augmented_inputs(self) -> Tensor:
        """Inputs (T, E), with a 1 appended for a bias."""
        if self.map.bias is None:
            return self.inputs
        return torch.cat([self.inputs, self.inputs.new_ones(len(self.inputs), 1)], dim=1)

    def by_position(self, gradients: Tensor) -> Tensor:
        """Gradients by the output of the call, (K, *output_shape), as (K, T, O)."""
        last = gradients if self.space is None else gradients.movedim(-1 - self.space, -1)
        return last.reshape(len(gradients), -1, self.map.n_outputs)


class LinearCallTracer(TorchFunctionMode):
    """A mode that records the linear calls in the forward of one row.

    Args:
        parameters: the chosen parameters, by name.
        offsets: tensors that are added to the outputs of the calls, in order, to differentiate by them.

    Attributes:
        calls: the recorded calls.
        other_uses: names of parameters that are also used in some other way.
        functions: the names of the functions of these other uses, by parameter.
    """

    def __init__(self, parameters: Mapping[str, Tensor], offsets: list[Tensor] | None = None) -> None:
        super().__init__()
        self._names = {id(tensor): name for name, tensor in parameters.items() if not tensor.is_complex()}
        self.offsets, self.calls = offsets, list[LinearCall]()
        self.other_uses: set[str] = set()
        self.functions: dict[str, set[str]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with _entered(self):
                return func(*args, **kwargs)
        reader = _READERS.get(func)
        linear_use = None if reader is None else reader(self._name_of, *args, **kwargs)
        result = func(*args, **kwargs)
        if linear_use is None:
            self._record_other(func, args, kwargs, result)
            return result
        self._record_other_uses(func, linear_use[0].names, args, kwargs, result)
        return self._record(linear_use, result)

    def _record(self, linear_use: _MapAndInputs, result: Tensor) -> Tensor:
        """Record a linear call, and return its output with the offset."""
        if self.offsets is not None:
            result = result + self.offsets[len(self.calls)]
        linear, inputs, space = linear_use
        self.calls.append(LinearCall(linear, inputs.positions(), result.shape, space))
        return result

    def _record_other(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: object
    ) -> None:
        """Record a call that is not linear in a chosen parameter."""
        self._record_other_uses(func, (), args, kwargs, result)

    def _record_other_uses(
        self,
        func: Callable[..., Any],
        known: Iterable[str],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: object,
    ) -> None:
        """Record parameters among the arguments whose use is not one of the `known` ones."""
        found = [name for name in map(self._name_of, tensors_of((args, kwargs))) if name]
        for name in known:
            found.remove(name)
        if found and tensors_of(result):  # asking for a shape or a dtype does not use the numbers
            self.other_uses.update(found)
            for name in found:
                self.functions.setdefault(name, set()).add(getattr(func, "__name__", repr(func)))

    def _name_of(self, tensor: object) -> str | None:
        """The name of a chosen parameter; None for any other object."""
        return self._names.get(id(tensor))


@contextmanager
def _entered(mode: TorchFunctionMode) -> Iterator[None]:
    """Trace the calls inside a function written in Python, which otherwise passes itself to the mode as one call."""
    original = F.has_torch_function  # type: ignore[attr-defined]
    F.has_torch_function = lambda *_: False  # type: ignore[attr-defined]
    try:
        with mode:
            yield
    finally:
        F.has_torch_function = original  # type: ignore[attr-defined]


_NameOf = Callable[[object], str | None]
_MapAndInputs = tuple[LinearMap, CallInputs, int | None]
"""The map, its inputs, and `LinearCall.space`."""


def _linear(name_of: _NameOf, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> _MapAndInputs | None:
    """The map and the inputs of a call of F.linear."""
    name = name_of(weight)
    if name is None:
        return None
    return LinearMap(name, name_of(bias), *weight.shape), VectorInputs(input), None


def _addmm(name_of: _NameOf, bias: Tensor, input: Tensor, weight: Tensor, **scales: float) -> _MapAndInputs | None:
    """The map and the inputs of a call of torch.addmm with a weight as the second matrix."""
    name = name_of(weight)
    if name is None or scales or bias.ndim != 1:
        return None
    n_inputs, n_outputs = weight.shape
    return LinearMap(name, name_of(bias), n_outputs, n_inputs, transposed=True), VectorInputs(input), None


def _reader_of(patches_of: Callable[..., ConvolutionPatches | None]) -> Callable[..., _MapAndInputs | None]:
    """The reader of the calls of one kind of convolution."""

    def read(name_of: _NameOf, *args: Any, **kwargs: Any) -> _MapAndInputs | None:  # noqa: ANN401
        weight = kwargs["weight"] if "weight" in kwargs else args[1]
        name = name_of(weight)
        call = None if name is None else patches_of(*args, **kwargs)
        if name is None or call is None:
            return None
        kernel = call.n_kernel if call.transposed else 1
        linear = LinearMap(name, name_of(call.bias), call.n_outputs, call.n_inputs, call.transposed, kernel)
        return linear, call, call.dimensions

    return read


_READERS: dict[Callable[..., Any], Callable[..., _MapAndInputs | None]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    **{convolution: _reader_of(patches_of) for convolution, patches_of in CONVOLUTIONS.items()},
}
