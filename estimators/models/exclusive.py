"""A lock that lets one computation run at a time: settings of torch that it changes are global.

Levels of forward-mode differentiation, the choice of the attention kernel and autocast are settings of the process or
the thread, and hooks that read features are settings of a module. Calls from several threads therefore wait for each
other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from estimators.models.outputs import without_inference
from estimators.models.preserved_state import preserved_state
from estimators.numerics.pytrees import PyTree, tensors_of
from estimators.runtime.rng import preserved_random_state

__all__ = ["exclusive", "exclusively", "wants_graph"]

F = TypeVar("F", bound=Callable[..., Any])

_LOCK = threading.RLock()
_DEPTH = 0
_CALLER_DIFFERENTIATES = True
"""Whether autograd was on when the outermost method was called; inside, `inference_mode(False)` turns it on."""


@contextmanager
def exclusive(model: nn.Module) -> Iterator[None]:
    """Hold the lock of the process without autocast and inference mode; restore the state of the model afterwards."""
    global _DEPTH, _CALLER_DIFFERENTIATES
    with _LOCK, ExitStack() as stack:
        if _DEPTH == 0:
            _CALLER_DIFFERENTIATES = torch.is_grad_enabled()
            stack.enter_context(torch.inference_mode(False))
            for device in ("cpu", "cuda", *({p.device.type for p in model.parameters()} - {"cpu", "cuda", "meta"})):
                if _autocasts(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            stack.enter_context(preserved_random_state())
            stack.enter_context(preserved_state(model))
            _leave_autocast(model)
        _DEPTH += 1
        try:
            yield
        finally:
            _DEPTH -= 1


def wants_graph(x: PyTree) -> bool:
    """Return whether results at x should have a graph: a tensor requires a gradient, and autograd is on."""
    is_on = _CALLER_DIFFERENTIATES if _DEPTH else torch.is_grad_enabled()
    return is_on and any(tensor.requires_grad for tensor in tensors_of(x))


def _leave_autocast(model: nn.Module) -> None:
    """Use the forward from before `accelerate` wrapped it in autocast, as `Trainer(bf16=True)` does.

    `preserved_state` restores the wrapped forward with the other attributes of the module.
    """
    for module in model.modules():
        original = vars(module).get("_original_forward")
        if original is not None and "forward" in vars(module):
            vars(module)["forward"] = original


def exclusively(method: F) -> F:
    """Run a public method of an estimator within `exclusive`; inference tensors among its arguments are copied."""

    @wraps(method)
    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:  # noqa: ANN401
        with exclusive(self.model):
            given = (arguments, keywords)
            if any(isinstance(leaf, Tensor) and leaf.is_inference() for leaf in pytree.tree_leaves(given)):
                arguments, keywords = pytree.tree_map_only(Tensor, without_inference, given)
            return method(self, *arguments, **keywords)

    return cast(F, call)


def _autocasts(device: str) -> bool:
    """Whether autocast is enabled for a type of device."""
    try:
        return torch.is_autocast_enabled(device)
    except RuntimeError:  # a device that does not know autocast
        return False
