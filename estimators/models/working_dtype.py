"""The dtype that a network is computed in: float32 or float64, whatever dtypes its weights are stored in.

A network in bfloat16 or float16, or in several dtypes (a frozen base in bfloat16 under adapters in float32), is
computed on a copy in one dtype: outputs and Jacobians are then right to the rounding of the weights themselves, where
those of the forward in bfloat16 are wrong in their third digit, and variances by 10 to 30 %.
"""

from __future__ import annotations

from functools import cache, reduce
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from estimators.numerics.pytrees import PyTree

__all__ = ["FLOATS", "in_dtype", "is_converted", "working_dtype"]

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Dtypes of weights that can be computed with, from narrow to wide; complex ones count by their parts."""
_CASTS = {Tensor.bfloat16, Tensor.half, Tensor.float}


def working_dtype(model: nn.Module) -> torch.dtype:
    """Returns the widest dtype of the floating-point and complex parameters, and at least float32."""
    dtypes = [p.dtype.to_real() for p in model.parameters() if p.is_floating_point() or p.is_complex()]
    return reduce(torch.promote_types, dtypes, torch.float32)


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Returns a structural copy of a model for `dtype`: itself, where all of its weights have it already.

    Parameters and buffers are converted, with new tensors in place of those that are shared with the user's model.
    Inputs are converted when it is called, and casts inside its forward to a narrower dtype lead to `dtype` instead.
    """
    floats = [p for p in model.parameters() if p.is_floating_point() or p.is_complex()]
    if all(p.dtype.to_real() == dtype for p in floats):
        return model
    made: dict[int, nn.Parameter] = {}
    for part in model.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                wide = nn.Parameter(_converted(parameter.detach(), dtype), requires_grad=parameter.requires_grad)
                part._parameters[name] = made.setdefault(id(parameter), wide)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = _converted(buffer, dtype)
    kind = type(model)
    plain = kind._plain if issubclass(kind, _Converting) else kind
    model.__class__ = _converting(plain, dtype)  # type: ignore[arg-type]
    return model


def is_converted(model: nn.Module) -> bool:
    """Whether a model is computed in another dtype than its weights were stored in."""
    return isinstance(model, _Converting)


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype, or in the complex one of such parts; whole numbers as they are."""
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


class _Converting:
    """What a converted model does when it is called; in front of its own class among the bases."""

    _dtype: ClassVar[torch.dtype]
    _plain: ClassVar[type[nn.Module]]

    def __call__(self, *args: PyTree, **kwargs: PyTree) -> Any:  # noqa: ANN401
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: _converted(t, self._dtype), (args, kwargs))
        with _WideCasts(self._dtype):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]


@cache
def _converting(kind: type[nn.Module], dtype: torch.dtype) -> type[nn.Module]:
    """The class of a converted model: a subclass of its own, so that methods and attributes stay what they are."""
    return type(kind.__name__, (_Converting, kind), {"_dtype": dtype, "_plain": kind, "__module__": kind.__module__})


class _WideCasts(TorchFunctionMode):
    """Casts and new tensors of a narrower dtype have `dtype` instead: a forward may name the dtype of its weights."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self._narrow = FLOATS[: FLOATS.index(dtype)]

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if func in _CASTS:
            return args[0].to(self.dtype)
        args, kwargs = pytree.tree_map_only(torch.dtype, self._wide, (args, kwargs))
        return func(*args, **kwargs)

    def _wide(self, dtype: torch.dtype) -> torch.dtype:
        return self.dtype if dtype in self._narrow else dtype
