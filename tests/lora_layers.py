"""Adapters as peft names them, without peft: a frozen linear layer with trainable lora_A and lora_B beside it."""

import copy

import torch
from torch import nn


class LoRALinear(nn.Module):
    """y = W x + b + s B A x, W and b frozen, with the parameter names of peft."""

    def __init__(self, base, rank=2, scaling=1.5):
        super().__init__()
        self.base_layer, self.scaling = base.requires_grad_(False), scaling
        like = {"bias": False, "dtype": base.weight.dtype, "device": base.weight.device}
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, **like)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, **like)})

    def forward(self, x):
        return self.base_layer(x) + self.scaling * self.lora_B["default"](self.lora_A["default"](x))


def with_adapters(model, rank=2):
    """A copy of a network with an adapter, drawn from a fixed seed, at every linear layer."""
    made = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        if isinstance(made, nn.Linear):
            return LoRALinear(made, rank)
        for name, module in list(made.named_modules()):
            if isinstance(module, nn.Linear):
                path, _, last = name.rpartition(".")
                setattr(made.get_submodule(path), last, LoRALinear(module, rank))
    for name, parameter in made.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return made
