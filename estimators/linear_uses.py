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

from estimators.pytrees import tensors_of

__all__ = ["LinearMap", "LinearUse", "UseRecorder"]


@dataclass(frozen=True)
class LinearMap:
    """A weight as a matrix (O, D), with its bias where both are chosen; `transposed`: it is stored as (D, O)."""

    weight: str
    bias: str | None
    n_outputs: int
    n_inputs: int
    transposed: bool = False

    @property
    def names(self) -> list[str]:
        """Weight first."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def shape(self) -> tuple[int, int]:
        """(O, E), E = D, or D + 1 with the bias as the last column."""
        return self.n_outputs, self.n_inputs + (self.bias is not None)


@dataclass(frozen=True)
class LinearUse:
    """One call on one row: inputs (T, D), one a place that the weight is applied to, and the shape of its output."""

    map: LinearMap
    inputs: Tensor
    output_shape: torch.Size
    channels_first: bool

    def rows(self) -> Tensor:
        """(T, E): a 1 appended for a bias."""
        if self.map.bias is None:
            return self.inputs
        return torch.cat([self.inputs, self.inputs.new_ones(len(self.inputs), 1)], dim=1)

    def slopes(self, pulled: Tensor) -> Tensor:
        """Slopes by the call's output (K, *output_shape) -> (K, T, O)."""
        if self.channels_first:
            return pulled.flatten(3).squeeze(1).transpose(1, 2)
        return pulled.reshape(len(pulled), -1, self.map.n_outputs)


class UseRecorder(TorchFunctionMode):
    """Records the uses in one forward on one row; adds offset i to the output of use i, to be differentiated by.

    `elsewhere`: chosen parameters that also entered in some other way.
    """

    def __init__(self, parameters: Mapping[str, Tensor], offsets: list[Tensor] | None = None) -> None:
        super().__init__()
        self._names = {id(tensor): name for name, tensor in parameters.items()}
        self.offsets, self.uses = offsets, list[LinearUse]()
        self.elsewhere: set[str] = set()

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
        self._see_elsewhere(use, args, kwargs, result)
        if use is None:
            return result
        if self.offsets is not None:
            result = result + self.offsets[len(self.uses)]
        linear, inputs, channels_first = use
        self.uses.append(LinearUse(linear, inputs, result.shape, channels_first))
        return result

    def _see_elsewhere(self, use: _Read, args: tuple[Any, ...], kwargs: dict[str, Any], result: object) -> None:
        """Parameters among the arguments that are not the weight or bias of the use."""
        found = [name for name in map(self._name_of, tensors_of((args, kwargs))) if name]
        for name in () if use is None else use[0].names:
            found.remove(name)
        if found and tensors_of(result):  # what asks for a shape or a dtype does not use the numbers
            self.elsewhere.update(found)

    def _name_of(self, tensor: object) -> str | None:
        return self._names.get(id(tensor))


@contextmanager
def _entered(mode: TorchFunctionMode) -> Iterator[None]:
    """Look inside a function of Python's, which hands itself over whole as long as it finds a mode switched on."""
    with mock.patch.object(F, "has_torch_function", return_value=False), mode:
        yield


_NameOf = Callable[[object], str | None]
_Read = tuple[LinearMap, Tensor, bool] | None


def _linear(name_of: _NameOf, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> _Read:
    name = name_of(weight)
    if name is None:
        return None
    return LinearMap(name, name_of(bias), *weight.shape), input.reshape(-1, weight.shape[1]), False


def _addmm(name_of: _NameOf, bias: Tensor, input: Tensor, weight: Tensor, **scales: float) -> _Read:
    name = name_of(weight)
    if name is None or scales or bias.ndim != 1:
        return None
    n_inputs, n_outputs = weight.shape
    return LinearMap(name, name_of(bias), n_outputs, n_inputs, transposed=True), input, False


def _conv2d(
    name_of: _NameOf,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> _Read:
    name = name_of(weight)
    if name is None or groups != 1 or isinstance(padding, str):
        return None
    patches = F.unfold(input, weight.shape[2:], dilation, padding, stride)  # (1, D, T)
    return LinearMap(name, name_of(bias), len(weight), weight[0].numel()), patches[0].T, True


_READERS: dict[Callable[..., Any], Callable[..., _Read]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.conv2d: _conv2d,
    F.conv2d: _conv2d,
}
