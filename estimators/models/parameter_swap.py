"""Swap the parameters of a module for other tensors, wherever its forward uses them.

`torch.func.functional_call` swaps the entries of `_parameters`. A weight that is used in another way, by a closure, a
list, a `functools.partial` or a forward that was replaced on the instance, keeps its old value there. `ParameterSwap`
replaces a parameter in the arguments of every torch function, by its identity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["ParameterSwap"]


class ParameterSwap(TorchFunctionMode):
    """A mode in which every torch function receives other tensors in place of parameters and buffers.

    Args:
        module: the module whose parameters and buffers are replaced.
        tensors: the replacements, by name; other parameters stay.
    """

    def __init__(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        named = dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])
        self._tensors = {id(named[name]): tensor for name, tensor in tensors.items()}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        return func(*(self._swapped(a) for a in args), **{k: self._swapped(v) for k, v in (kwargs or {}).items()})

    def _swapped(self, value: Any) -> Any:  # noqa: ANN401
        """An argument with replacements for all parameters in it."""
        if isinstance(value, Tensor):
            return self._tensors.get(id(value), value)
        if type(value) in (list, tuple):
            return type(value)(self._swapped(part) for part in value)
        if type(value) is dict:
            return {key: self._swapped(part) for key, part in value.items()}
        return value
