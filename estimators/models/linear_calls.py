"""See every use of a chosen parameter as the weight of a linear map, whatever module or function makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from estimators.models.convolution_calls import CONVOLUTIONS, ConvolutionPatches
from estimators.numerics.pytrees import tensors_of

__all__ = ["LinearCall", "LinearCallTracer", "LinearMap"]


@dataclass(frozen=True)
class LinearMap:
    """A weight as a matrix (O, D), with its bias where both are chosen.

    `transposed`: it is stored as (D, O); of a transposed convolution as (D/k, O, k), k = `n_kernel` entries of its
    kernel.
    """

    weight: str
    bias: str | None
    n_outputs: int
    n_inputs: int
    transposed: bool = False
    n_kernel: int = 1

    @property
    def names(self) -> list[str]:
        """Weight first."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def shape(self) -> tuple[int, int]:
        """(O, E), E = D, or D + 1 with the bias as the last column."""
        return self.n_outputs, self.n_inputs + (self.bias is not None)


@dataclass(frozen=True)
class LinearCall:
    """One call on one row: inputs (T, D), one a place that the weight is applied to, and the shape of its output.

    `space`: how many dimensions come after the channels in that shape; None where the channels are last.
    """

    map: LinearMap
    inputs: Tensor
    output_shape: torch.Size
    space: int | None

    def rows(self) -> Tensor:
        """(T, E): a 1 appended for a bias."""
        if self.map.bias is None:
            return self.inputs
        return torch.cat([self.inputs, self.inputs.new_ones(len(self.inputs), 1)], dim=1)

    def slopes(self, pulled: Tensor) -> Tensor:
        """Slopes by the call's output (K, *output_shape) -> (K, T, O)."""
        last = pulled if self.space is None else pulled.movedim(-1 - self.space, -1)
        return last.reshape(len(pulled), -1, self.map.n_outputs)


class LinearCallTracer(TorchFunctionMode):
    """Records the uses in one forward on one row; adds offset i to the output of use i, to be differentiated by.

    `elsewhere`: chosen parameters that also entered in some other way, and `functions`: by which functions.
    """

    def __init__(self, parameters: Mapping[str, Tensor], offsets: list[Tensor] | None = None) -> None:
        super().__init__()
        self._names = {id(tensor): name for name, tensor in parameters.items() if not tensor.is_complex()}
        self.offsets, self.uses = offsets, list[LinearCall]()
        self.elsewhere: set[str] = set()
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
        use = None if reader is None else reader(self._name_of, *args, **kwargs)
        result = func(*args, **kwargs)
        self._see_elsewhere(func, use, args, kwargs, result)
        if use is None:
            return result
        if self.offsets is not None:
            result = result + self.offsets[len(self.uses)]
        linear, inputs, space = use
        self.uses.append(LinearCall(linear, inputs, result.shape, space))
        return result

    def _see_elsewhere(
        self,
        func: Callable[..., Any],
        use: _Read,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: object,
    ) -> None:
        """Parameters among the arguments that are not the weight or bias of the use."""
        found = [name for name in map(self._name_of, tensors_of((args, kwargs))) if name]
        for name in () if use is None else use[0].names:
            found.remove(name)
        if found and tensors_of(result):  # what asks for a shape or a dtype does not use the numbers
            self.elsewhere.update(found)
            for name in found:
                self.functions.setdefault(name, set()).add(getattr(func, "__name__", repr(func)))

    def _name_of(self, tensor: object) -> str | None:
        return self._names.get(id(tensor))


@contextmanager
def _entered(mode: TorchFunctionMode) -> Iterator[None]:
    """Look inside a function of Python's, which hands itself over whole as long as it finds a mode switched on."""
    with mock.patch.object(F, "has_torch_function", return_value=False), mode:
        yield


_NameOf = Callable[[object], str | None]
_Read = tuple[LinearMap, Tensor, int | None] | None


def _linear(name_of: _NameOf, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> _Read:
    name = name_of(weight)
    if name is None:
        return None
    return LinearMap(name, name_of(bias), *weight.shape), input.reshape(-1, weight.shape[1]), None


def _addmm(name_of: _NameOf, bias: Tensor, input: Tensor, weight: Tensor, **scales: float) -> _Read:
    name = name_of(weight)
    if name is None or scales or bias.ndim != 1:
        return None
    n_inputs, n_outputs = weight.shape
    return LinearMap(name, name_of(bias), n_outputs, n_inputs, transposed=True), input, None


def _reader_of(patches_of: Callable[..., ConvolutionPatches | None]) -> Callable[..., _Read]:
    """The reader of a kind of convolution."""

    def read(name_of: _NameOf, *args: Any, **kwargs: Any) -> _Read:  # noqa: ANN401
        weight = kwargs["weight"] if "weight" in kwargs else args[1]
        name = name_of(weight)
        call = None if name is None else patches_of(*args, **kwargs)
        if name is None or call is None:
            return None
        kernel = call.n_kernel if call.transposed else 1
        linear = LinearMap(name, name_of(call.bias), call.n_outputs, call.n_inputs, call.transposed, kernel)
        return linear, call.patches(), call.dimensions

    return read


_READERS: dict[Callable[..., Any], Callable[..., _Read]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    **{convolution: _reader_of(patches_of) for convolution, patches_of in CONVOLUTIONS.items()},
}
