"""One computation at a time, in the precision of the weights: torch's forward mode and kernel settings are global.

Levels of forward-mode differentiation, the attention kernel that is chosen and autocast are settings of the process or
thread; hooks that read features are settings of a module. Calls from several threads therefore take turns.
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

from estimators.models.preserved_state import preserved_state
from estimators.runtime.rng import preserved_random_state

__all__ = ["exclusive", "exclusively"]

F = TypeVar("F", bound=Callable[..., Any])

_LOCK = threading.RLock()
_DEPTH = 0


@contextmanager
def exclusive(model: nn.Module) -> Iterator[None]:
    """Take the turn of this process, without autocast or inference mode; what a forward moves is put back."""
    global _DEPTH
    with _LOCK, ExitStack() as stack:
        if _DEPTH == 0:
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


def _leave_autocast(model: nn.Module) -> None:
    """Use the forward from before `accelerate` wrapped it in autocast, as `Trainer(bf16=True)` leaves it.

    The wrapped forward is put back with the other attributes of the module.
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
                arguments, keywords = pytree.tree_map_only(Tensor, _ordinary, given)
            return method(self, *arguments, **keywords)

    return cast(F, call)


def _ordinary(tensor: Tensor) -> Tensor:
    """A tensor made in inference mode cannot be differentiated through: a copy can."""
    return tensor.clone() if tensor.is_inference() else tensor


def _autocasts(device: str) -> bool:
    try:
        return torch.is_autocast_enabled(device)
    except RuntimeError:  # a device that does not know autocast
        return False
