"""Detect side effects on a model and on the global random states."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from estimators.runtime.rng import preserved_random_state
from estimators.testing.outcomes import CheckFailure

__all__ = ["advanced_random_state", "unchanged_model", "unchanged_random_state"]


@contextmanager
def unchanged_model(model: nn.Module, during: str) -> Iterator[None]:
    """Raise CheckFailure if weights, buffers, modes, requires_grad, gradients or hooks change inside the block."""
    before = _state(model)
    yield
    after = _state(model)
    changed = [name for name in before.keys() | after.keys() if not _same(before.get(name), after.get(name))]
    if changed:
        raise CheckFailure(
            f"a model that {during} does not change",
            received=f"a change of {', '.join(sorted(changed)[:4])}",
            fault="work on a copy (estimators.models.Network), or restore the model in a finally clause.",
        )


def _state(model: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state[f"{name}.requires_grad"] = parameter.requires_grad
        state[f"{name}.grad"] = None if parameter.grad is None else parameter.grad.clone()
        state[f"{name} (the tensor itself)"] = id(parameter)
    for name, module in model.named_modules():
        state[f"mode of {name or 'the model'}"] = module.training
        state[f"hooks of {name or 'the model'}"] = [len(getattr(module, hooks)) for hooks in _HOOKS]
    return state


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(123.0), b.nan_to_num(123.0))
    return type(a) is type(b) and a == b


@contextmanager
def unchanged_random_state(during: str) -> Iterator[None]:
    """Raise CheckFailure if the random state of torch, numpy or random changes inside the block; then restore it."""
    with preserved_random_state():
        before = _random_state()
        yield
        after = _random_state()
    changed = [name for name in before if before[name] != after[name]]
    if changed:
        raise CheckFailure(
            f"global random states of {', '.join(before)} that {during} does not change",
            received=f"a change of {', '.join(changed)}",
            fault="draw from a torch.Generator with a seed field, or use estimators.runtime.rng.preserved_random_state",
        )


@contextmanager
def advanced_random_state() -> Iterator[None]:
    """Use another global random state inside the block, and restore the old one."""
    with preserved_random_state():
        torch.rand(17)
        np.random.random(17)
        random.random()
        yield


def _random_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    numpy_state = (kind, tuple(np.asarray(keys).tolist()), *rest)
    return {"torch": bytes(torch.get_rng_state().numpy()), "numpy": numpy_state, "random": random.getstate()}
