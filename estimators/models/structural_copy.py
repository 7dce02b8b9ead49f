"""Copy the modules of a model without copying its weights."""

from __future__ import annotations

import copy
from itertools import chain

import torch
from torch import Tensor, nn

__all__ = ["structural_copy"]


def structural_copy(model: nn.Module) -> nn.Module:
    """Make new module objects around the same parameters, with copies of the buffers (a forward may write to them).

    Hooks and swaps on the copy never reach the user's model. Tensors that a forward has left on a module (a cached
    activation, the weight of an old-style weight norm) are shared, since tensors with a graph cannot be copied. All
    attributes are shared if `copy.deepcopy` cannot copy the model (scripted functions, locks, open files).
    """
    left = [t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor)]
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), left)}
    try:
        return copy.deepcopy(model, shared)
    except Exception:
        return _modules_copied(model, {})


def _modules_copied(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """Copy the module objects, buffers and dicts of hooks, and share every other attribute."""
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
