"""A copy of a module that shares its weights."""

from __future__ import annotations

import copy
from itertools import chain

import torch
from torch import Tensor, nn

__all__ = ["structural_copy"]


def structural_copy(model: nn.Module) -> nn.Module:
    """New module objects around the same parameters, with buffers of their own (a forward may write to them).

    Hooks and swaps on the copy never reach the user's model. Tensors that a forward has left on a module (a cached
    activation, the weight of an old-style weight norm) are shared: those with a graph cannot be copied. So are all
    attributes of a model that `copy.deepcopy` cannot copy (scripted functions, locks, open files).
    """
    left = [t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor)]
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), left)}
    try:
        return copy.deepcopy(model, shared)
    except Exception:
        return _modules_copied(model, {})


def _modules_copied(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """The same, with every attribute but submodules, buffers and the dicts of hooks shared."""
    if id(module) in made or isinstance(module, torch.jit.ScriptModule):
        return made.get(id(module), module)
    other = made[id(module)] = module.__new__(type(module))
    other.__dict__ = {
        name: copy.copy(value) if name.startswith("_") and isinstance(value, dict) else value
        for name, value in vars(module).items()
    }
    other._buffers = {name: b if b is None else b.detach().clone() for name, b in module._buffers.items()}
    other._modules = {
        name: child if child is None else _modules_copied(child, made) for name, child in module._modules.items()
    }
    return other
