"""Record the random operations of torch in a forward pass, except those of attention and recurrent layers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from estimators.runtime.rng import seeded_random_state

__all__ = ["RandomOperations"]

_STAYS_OFF = frozenset(
    (
        "multi_head_attention_forward",
        "scaled_dot_product_attention",
        *("lstm", "gru", "rnn_tanh", "rnn_relu"),
        *("rrelu", "rrelu_"),
    )
)
"""Functions of torch whose randomness is documented to stay off: attention, recurrent layers, random slopes."""
_ATTENTION_KERNELS = ("_scaled_dot_product", "_fused_sdp", "_flash_attention", "_efficient_attention", "_cudnn")
"""Prefixes of operations that torch marks as random even if they drop nothing."""
_UNIFORM = frozenset(("rand", "rand_like", "uniform", "uniform_"))
"""Operations that return uniform numbers. A model may compare these with a rate of 0, so that they change nothing."""


class RandomOperations:
    """The random operations of the forward passes inside `recorded`.

    Args:
        end: 0 or 1 replaces all uniform numbers by the lower or upper end of their range. A branch with a probability
            between 0 and 1, such as stochastic depth, is then different at the two ends, however small its probability.
            None leaves the numbers as they are.

    Attributes:
        names: functions of torch that are always random, each once, in the order of their calls.
        uniform_names: functions of torch for uniform numbers, each once, in the order of their calls.
        outside_torch: whether the global generators of numpy or `random` were used.
    """

    def __init__(self, end: int | None) -> None:
        self.end = end
        self.names: list[str] = []
        self.uniform_names: list[str] = []
        self.outside_torch = False

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the random operations inside the block."""
        functions = _Functions()
        python, arrays = random.getstate(), np.random.get_state(legacy=False)
        with functions, _Operations(self, functions):
            yield
        self.outside_torch = python != random.getstate() or not _same(arrays, np.random.get_state(legacy=False))


class _Functions(TorchFunctionMode):
    """Knows which function of torch runs. Functions that stay off use the same numbers in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.running = ""

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        before, self.running = self.running, getattr(func, "__name__", "")
        try:
            if self.running in _STAYS_OFF:
                with seeded_random_state(0):
                    return func(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))
        finally:
            self.running = before


class _Operations(TorchDispatchMode):
    """Sees the operations that functions of torch consist of, each with the tag that says whether it is random."""

    def __init__(self, found: RandomOperations, functions: _Functions) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found, self.functions = found, functions

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        result = func(*args, **(kwargs or {}))
        operation, function = func.overloadpacket.__name__, self.functions.running
        if torch.Tag.nondeterministic_seeded not in func.tags or operation.startswith(_ATTENTION_KERNELS):
            return result
        if function in _STAYS_OFF:
            return result
        is_uniform = operation in _UNIFORM
        names = self.found.uniform_names if is_uniform else self.found.names
        if (name := function or operation) not in names:
            names.append(name)
        if is_uniform and self.found.end is not None:
            _move_to_end_(result, self.found.end, *(args[1:] if operation.startswith("uniform") else ()))
        return result


def _move_to_end_(numbers: Tensor, end: int, low: float = 0.0, high: float = 1.0) -> None:
    """Replace uniform numbers in [low, high) by the lowest, or by one that is the highest up to round-off."""
    numbers.fill_(low if end == 0 else high - (high - low) * torch.finfo(numbers.dtype).eps)


def _same(first: Any, second: Any) -> bool:  # noqa: ANN401
    """Whether two states of a generator of numpy are equal."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    return bool(np.array_equal(first, second))
