"""Jacobian rows J(x) for dense curvatures: by BackPACK if it supports all layers, else by torch.func.

BackPACK (Dangel et al. 2020) extends a private deep copy of the model, so that its hooks never reach the user's model.
It is used for nested `Sequential`s of the layers that it supports. All other models (attention, norms over features,
residual connections, custom forwards) are differentiated by `torch.func`.
"""

from __future__ import annotations

import copy
from contextlib import suppress

import torch
from torch import Tensor, nn

from estimators.models.network import Network
from estimators.models.outputs import output_tensor
from estimators.numerics.pytrees import PyTree

__all__ = ["JacobianRows", "backpack_supports"]

_BACKPACK = "rows of J by BackPACK"

_KNOWN_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.Sigmoid,
    nn.LogSigmoid,
    nn.Tanh,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.Flatten,
    nn.Identity,
    nn.Dropout,
    nn.ZeroPad2d,
)


class JacobianRows:
    """A function from x to J (B, C, P) at θ̂, compared with plain autograd at every training row."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self._backpack = None
        if backpack_supports(network):
            with suppress(Exception):  # an attribute of the module cannot be copied
                self._backpack = _BackpackRows(network)

    @property
    def backend(self) -> str:
        """The route in use: "backpack", "torch.func", or "autograd" if both disagree with plain autograd."""
        if self._backpack is not None and not self.network.routes.first.get(_BACKPACK, 0):
            return "backpack"
        return "autograd" if self.network.routes.first.get("rows of J", 0) else "torch.func"

    def __call__(self, x: PyTree) -> Tensor:
        if self._backpack is None:
            return self.network.jacobian(x)
        rows = self._backpack
        routes = [("BackPACK", lambda: rows(x)), ("torch.func", lambda: self.network.jacobian(x))]
        difference = self.network.jacobian_difference(x, _BACKPACK)
        check = self.network.check
        return self.network.routes.first_agreeing(check, _BACKPACK, x, routes, difference, last_is_plain=False)


def backpack_supports(network: Network) -> bool:
    """Whether the module is a nest of Sequentials of known plain layers without hooks, tied or shared parts."""
    leaves: list[nn.Module] = []
    if not _collect_sequential(network.module, leaves):
        return False
    return len({id(leaf) for leaf in leaves}) == len(leaves) and not _has_tied_parameters(network.module)


def _collect_sequential(module: nn.Module, leaves: list[nn.Module]) -> bool:
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return False
    if type(module) is nn.Sequential:
        return all([_collect_sequential(child, leaves) for child in module])
    leaves.append(module)
    return type(module) in _KNOWN_LAYERS and _has_plain_padding(module)


def _has_plain_padding(module: nn.Module) -> bool:
    """Whether padding is by zeros, as numbers: BackPACK ignores other modes, and warns for "same"."""
    return getattr(module, "padding_mode", "zeros") == "zeros" and not isinstance(getattr(module, "padding", 0), str)


def _has_tied_parameters(module: nn.Module) -> bool:
    every = [id(p) for _, p in module.named_parameters(remove_duplicate=False)]
    return len(every) != len(set(every))


class _BackpackRows:
    """J (B, C, P) by a backward pass per output, with per-example gradients by BackPACK's BatchGrad."""

    def __init__(self, network: Network) -> None:
        from backpack import extend

        self.network = network
        self.module = copy.deepcopy(network.module)
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name in network.subset.shapes)
        _disable_inplace(self.module)
        extend(self.module)

    def __call__(self, x: PyTree) -> Tensor:
        from backpack import backpack
        from backpack.extensions import BatchGrad

        parameters = dict(self.module.named_parameters())
        chosen = [parameters[name] for name in self.network.subset.shapes]
        columns = []
        with torch.enable_grad():
            f = output_tensor(self.module(_with_gradient(x))).flatten(1)
            for c in range(f.shape[-1]):
                keep = c + 1 < f.shape[-1]
                with backpack(BatchGrad(), retain_graph=keep):
                    f[:, c].sum().backward(retain_graph=keep)
                columns.append(torch.cat([p.grad_batch.reshape(f.shape[0], -1) for p in chosen], dim=1))  # type: ignore[attr-defined]
                self.module.zero_grad(set_to_none=True)
        jacobian = torch.stack(columns, dim=1).detach()
        self.network.pass_counter.forward(len(jacobian))
        self.network.pass_counter.backward(len(jacobian) * len(columns))
        return jacobian


def _disable_inplace(module: nn.Module) -> None:
    """Make activations allocate their output: backward hooks forbid in-place ones, and the values are the same."""
    for layer in module.modules():
        if getattr(layer, "inplace", False):
            layer.inplace = False  # type: ignore[assignment]


def _with_gradient(x: PyTree) -> PyTree:
    """x as a leaf that requires a gradient: BackPACK's module hooks run fully only then.

    A dict has the single argument of a Sequential, by name.
    """
    if isinstance(x, dict):
        (x,) = x.values()
    return x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
