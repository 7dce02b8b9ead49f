"""A simulated accelerator: tensors of the device "sim" compute on the CPU, but do not mix with tensors of the CPU.

It shows on any machine whether code runs on an accelerator. It raises where a GPU would: for an operation on tensors of
two devices, for `numpy()` of a tensor on the device, for a generator of the other device. Numbers are those of the CPU,
to the last bit, so that results can be compared exactly. Importing this module registers the device, which has to
happen before the first backward pass of the process: import it at the top of a test module.

    model, x = model.to(DEVICE), x.to(DEVICE)
    with generators_of_the_device():  # torch.Generator(DEVICE)
        variance = estimator.fit(loader).variance(x)
    assert variance.device == DEVICE
    variance.cpu()

It uses the registration of a backend in Python: tensors of the device are wrappers around tensors of the CPU, whose
operations arrive in `__torch_dispatch__`; functions that make tensors (`torch.zeros(3, device="sim")`) are registered
one by one. Memory, streams, timing and rounding of an accelerator are not simulated.
"""

import copy
import sys
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_map

__all__ = ["DEVICE", "DeviceTensor", "generators_of_the_device"]

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("needs a torch with backends in Python: 2.9 or newer", allow_module_level=True)
NAME = "sim"
CPU = torch.device("cpu")


class _BackendModule(backend_registration._DummyBackendModule):
    """What is found as torch.sim. Not available, so that no other library chooses it by itself."""

    def is_available(self):
        return False

    def get_rng_state(self, device=None):  # noqa: ARG002
        """That of the CPU, which draws its numbers; asked for by `torch.random.fork_rng()`."""
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):  # noqa: ARG002
        """Set that of the CPU."""
        torch.set_rng_state(state)


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_BackendModule())
DEVICE = torch.device(NAME, 0)

_FACTORIES = {  # by name: the overloads
    **dict.fromkeys(("empty_permuted", "empty_strided", "full", "linspace", "logspace", "ones", "zeros"), ("",)),
    **dict.fromkeys(("scalar_tensor", "tril_indices", "triu_indices"), ("",)),
    **dict.fromkeys(("rand", "randn", "randperm"), ("", "generator")),
    "arange": ("", "start", "start_step"),
    "empty": ("memory_format",),
    "eye": ("", "m"),
    "normal": ("float_float",),
    "randint": ("", "generator", "low", "low_generator"),
}
# Indices may be on the CPU; the tensor that is indexed, and values that are put into it, have to be on one device.
_INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")


class DeviceTensor(torch.Tensor):
    """A tensor on the simulated device: `inner` has its numbers, on the CPU."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=DEVICE,
        )

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"{self.inner!r} on {DEVICE}"

    def numpy(self, *_, **__):
        raise TypeError(f"can't convert a tensor on {DEVICE} to numpy: use .cpu() first")

    __array__ = numpy

    def tolist(self):
        return self.inner.tolist()

    def data_ptr(self):
        return self.inner.data_ptr()

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            made = DeviceTensor(self.inner.clone()).requires_grad_(self.requires_grad)
            made.__dict__.update({name: value for name, value in vars(self).items() if name != "inner"})  # a parameter
            made.grad = copy.deepcopy(self.grad, memo)
            memo[id(self)] = made
        return memo[id(self)]

    def _set_data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.inner = value.inner

    data = property(torch.Tensor.data.__get__, _set_data)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {})


def _call(func, args, kwargs):
    """One operation on the tensors inside, after the checks that a device makes."""
    _check_devices(func, args, kwargs)
    if func is torch.ops.aten.set_.source_Tensor:
        args[0].inner = args[1].inner  # a wrapper has no storage of its own
        return args[0]
    if torch.Tag.inplace_view in func.tags:
        with no_dispatch():
            func(*args, **kwargs)  # the shape of the wrapper
    result = func(*_inner(args), **{name: _inner(value) for name, value in kwargs.items()})
    if _written(func):
        return _arguments_written(func, args, kwargs)
    device = kwargs.get("device")
    return result if device is not None and device.type != NAME else _on_device(result)


def _inner(value):
    """With the tensors inside, and the CPU in the place of the device."""
    if isinstance(value, DeviceTensor):
        return value.inner
    if isinstance(value, list | tuple):
        return [_inner(v) for v in value]
    return CPU if isinstance(value, torch.device) and value.type == NAME else value


def _on_device(value):
    """A result, with every tensor wrapped."""
    if isinstance(value, torch.Tensor):
        return DeviceTensor(value)
    return tree_map(_on_device, value) if isinstance(value, list | tuple) else value


@cache
def _written(func):
    """(position, name) of the arguments that an operation writes to and returns."""
    arguments = func._schema.arguments
    returned = [r.alias_info.before_set for r in func._schema.returns if r.alias_info and r.alias_info.is_write]
    return [(i, a.name) for i, a in enumerate(arguments) if a.alias_info and a.alias_info.before_set in returned]


def _arguments_written(func, args, kwargs):
    """The same objects that were passed: their numbers have changed, their shapes must not have."""
    written = tuple(args[i] if i < len(args) else kwargs[name] for i, name in _written(func))
    if any(isinstance(w, DeviceTensor) and w.shape != w.inner.shape for w in written):
        raise NotImplementedError(f"simulated device: {func} changed the shape of a tensor in place")
    return written if len(func._schema.returns) > 1 else written[0]


def _check_devices(func, args, kwargs):
    """RuntimeError for tensors of two devices, or a generator of the other one, as an accelerator raises it."""
    name = func._opname
    if name in ("copy_", "_to_copy", "_copy_from"):
        return
    if name in _INDEXED:
        args = (args[0], *args[2:])
    values = _flat([*args, *kwargs.values()])
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    others = [v for v in tensors if not isinstance(v, DeviceTensor)]
    if others and (len(others) == len(tensors) or not all(v.dim() == 0 and _takes_numbers(func) for v in others)):
        found = ", ".join(f"{tuple(v.shape)} on {v.device}" for v in tensors)
        raise RuntimeError(f"simulated device: {func} expected all tensors on one device, got {found}")
    device = kwargs.get("device") or DEVICE
    generators = [v for v in values if isinstance(v, torch._C.Generator)]
    if any((v._cdata in _generators) != (device.type == NAME) for v in generators):
        raise RuntimeError(f"simulated device: {func} expected a generator of {device}, got one of the other device")


def _flat(values):
    return [v for value in values for v in (_flat(value) if isinstance(value, list | tuple) else [value])]


@cache
def _takes_numbers(func):
    """Whether a tensor without dimensions may come from the CPU, as a number would."""
    return torch.Tag.pointwise in func.tags or func._opname in ("fill_", "masked_fill", "masked_fill_", *_INDEXED)


_generators = set()  # the addresses of those on the device


class _Generator(torch.Generator):
    """torch.Generator, which may be told to be on the simulated device; its numbers are the CPU's."""

    def __new__(cls, device=CPU):
        made = super().__new__(cls)
        if torch.device(device).type == NAME:
            _generators.add(made._cdata)
        return made

    def __init__(self, device=CPU):
        pass

    def __del__(self):
        _generators.discard(self._cdata)

    @property
    def device(self):
        return DEVICE if self._cdata in _generators else CPU


class _GeneratorsOfTheCPU(TorchFunctionMode):
    """RuntimeError for numbers drawn on the CPU by a generator of the device: such calls do not arrive at a tensor."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        drawn = isinstance(kwargs.get("generator"), _Generator) and isinstance(result, torch.Tensor)
        if drawn and result.device != kwargs["generator"].device:
            raise RuntimeError(f"simulated device: {func} on {result.device} got a generator of {DEVICE}")
        return result


@contextmanager
def generators_of_the_device():
    """Let torch.Generator take the device, which PyTorch has no registration for in Python."""
    original = torch.Generator
    _replace_generator(original, _Generator)
    try:
        with _GeneratorsOfTheCPU():
            yield
    finally:
        _replace_generator(_Generator, original)


def _replace_generator(old, new):
    """In torch, and in modules of others that say `from torch import Generator`, imported before or inside."""
    for name, module in list(sys.modules.items()):
        if not name.startswith("torch.") and getattr(module, "__dict__", {}).get("Generator") is old:
            module.Generator = new


def _factory(name, overload=""):
    operator = getattr(getattr(torch.ops.aten, name), overload or "default")
    return lambda *args, **kwargs: _call(operator, args, kwargs)


def _copy_from(source, target, non_blocking=False):  # noqa: ARG001
    _inner(target).copy_(_inner(source))
    return target


_library = torch.library.Library("aten", "IMPL")
for _name, _overloads in _FACTORIES.items():
    for _overload in _overloads:
        _library.impl(f"{_name}.{_overload}".rstrip("."), _factory(_name, _overload), "PrivateUse1")
_library.impl("_copy_from", _copy_from, "PrivateUse1")
_library.impl("_efficientzerotensor", _factory("zeros"), "PrivateUse1")  # tangents: here with memory, as others are
