"""The dtype of the computation of a network: float32 or float64, whatever dtypes its weights are stored in.

A network in bfloat16 or float16, or in several dtypes (a frozen base in bfloat16 with adapters in float32), is
computed on a copy in one dtype. Outputs and Jacobians are then right up to the rounding of the weights. Computed in
bfloat16 they are wrong in the third digit, and variances by 10 to 30 %.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, reduce
from typing import Any, ClassVar, SupportsIndex

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from estimators.numerics.pytrees import PyTree

__all__ = ["FLOATS", "in_dtype", "is_converted", "working_dtype"]

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Supported dtypes of weights, from narrow to wide; a complex dtype counts as that of its parts."""
_CASTS = {Tensor.bfloat16, Tensor.half, Tensor.float}


def working_dtype(model: nn.Module) -> torch.dtype:
    """Return the widest dtype of the floating-point and complex parameters, at least float32."""
    dtypes = [p.dtype.to_real() for p in model.parameters() if p.is_floating_point() or p.is_complex()]
    return reduce(torch.promote_types, dtypes, torch.float32)


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert a structural copy of a model to `dtype`, in place; nothing is done if all of its weights have it already.

    New tensors replace the parameters and buffers that are shared with the user's model. The converted model converts
    its inputs, and casts to a narrower dtype inside its forward give `dtype` instead.
    """
    floats = [p for p in model.parameters() if p.is_floating_point() or p.is_complex()]
    if all(p.dtype.to_real() == dtype for p in floats):
        return model
    made: dict[int, nn.Parameter] = {}
    for part in model.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                converted = nn.Parameter(_converted(parameter.detach(), dtype), requires_grad=parameter.requires_grad)
                part._parameters[name] = made.setdefault(id(parameter), converted)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = _converted(buffer, dtype)
    kind = type(model)
    plain = kind._plain if issubclass(kind, _Converting) else kind
    model.__class__ = _converting(plain, dtype)  # type: ignore[arg-type]
    return model


def is_converted(model: nn.Module) -> bool:
    """Whether `in_dtype` has converted the model from the dtype in which its weights are stored."""
    return isinstance(model, _Converting)


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`, or in the complex dtype with such parts; integers stay as they are."""
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


class _Converting:
    """The call of a converted model: the first base of its class, before the model's own class."""

    _dtype: ClassVar[torch.dtype]
    _plain: ClassVar[type[nn.Module]]

    def __call__(self, *args: PyTree, **kwargs: PyTree) -> Any:  # noqa: ANN401
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: _converted(t, self._dtype), (args, kwargs))
        with _ConvertedCasts(self._dtype):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:  # noqa: ANN401
        """What a pickle keeps: how to make a model of the model's own class, which it can find, and the dtype."""
        reduced: Any = super().__reduce_ex__(protocol)
        if isinstance(reduced, str):  # the name of a global model
            return reduced
        make, args, *state = reduced
        make, *args = (self._plain if part is type(self) else part for part in (make, *args))
        return (_remade, (make, tuple(args), self._dtype), *state)


def _remade(make: Callable[..., nn.Module], args: tuple[Any, ...], dtype: torch.dtype) -> nn.Module:
    """A converted model from a pickle, before its state is set."""
    model = make(*args)
    model.__class__ = _converting(type(model), dtype)  # type: ignore[arg-type]
    return model


@cache
def _converting(kind: type[nn.Module], dtype: torch.dtype) -> type[nn.Module]:
    """The class of a converted model: a subclass of its own class, so that it keeps methods and attributes."""
    return type(kind.__name__, (_Converting, kind), {"_dtype": dtype, "_plain": kind, "__module__": kind.__module__})


class _ConvertedCasts(TorchFunctionMode):
    """A mode in which casts and new tensors have `dtype` instead of a narrower one: a forward may name such a dtype."""

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
        wider = dict.fromkeys(self._narrow, self.dtype)
        args, kwargs = pytree.tree_map_only(torch.dtype, lambda dtype: wider.get(dtype, dtype), (args, kwargs))
        return func(*args, **kwargs)
