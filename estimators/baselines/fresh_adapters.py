"""A copy of a network with newly initialised trainable weights (adapters and heads) and shared frozen weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from estimators.errors import ModelError
from estimators.runtime.module_wrappers import plain_names

__all__ = ["trained_tensors", "with_fresh_adapters"]


def with_fresh_adapters(model: nn.Module) -> nn.Module:
    """Return a copy of `model` with the same frozen weights, and trainable ones drawn from the global random state.

    LoRA layers are initialised as peft does, other layers by their `reset_parameters`.
    Raises ModelError if nothing is frozen, or if a layer with trainable weights has no `reset_parameters`.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad]
    if not frozen:
        raise ModelError(
            "a model whose weights except adapters are frozen (requires_grad=False)",
            received="one without frozen weights",
            remedy="DeepEnsemble for whole networks; peft's get_peft_model, or requires_grad_(False), for adapters.",
        )
    made = copy.deepcopy(model, {id(p): p for p in frozen})
    _initialise(made, "")
    return made


def trained_tensors(model: nn.Module, shared: nn.Module) -> dict[str, Tensor]:
    """Return the trainable parameters, and the buffers that differ from those of `shared`, by name."""
    shared_buffers = dict(shared.named_buffers())
    buffers = [(name, b) for name, b in model.named_buffers() if not torch.equal(b, shared_buffers[name])]
    parameters = [(name, p.detach()) for name, p in model.named_parameters() if p.requires_grad]
    tensors = dict([*parameters, *buffers])
    return {plain: tensors[name] for name, plain in plain_names(model, tensors)}


def _initialise(module: nn.Module, name: str) -> None:
    """Initialise the trainable weights of a module and of its submodules."""
    if not any(p.requires_grad for p in module.parameters()):
        return
    lora: Any = module
    if hasattr(lora, "reset_lora_parameters"):
        for adapter in dict.fromkeys([*lora.lora_A, *lora.lora_embedding_A]):
            lora.reset_lora_parameters(adapter, init_lora_weights=True)
        return
    if any(p.requires_grad for p in module.parameters(recurse=False)):
        _reset(module, name)
    for child_name, child in module.named_children():
        _initialise(child, f"{name}.{child_name}" if name else child_name)


def _reset(module: nn.Module, name: str) -> None:
    reset: Any = getattr(module, "reset_parameters", None)
    if not callable(reset):
        raise ModelError(
            "trainable weights in LoRA layers, or in layers with reset_parameters",
            received=f"some in {name or 'the model itself'!r}, a {type(module).__name__}",
            remedy="freeze them, or use DeepEnsemble with a make_model that initialises them.",
        )
    reset()
