"""Jacobian rows J(x) for dense curvatures: BackPACK where its layers allow, torch.func where not.

BackPACK (Dangel et al. 2020) extends a private deep copy of the model, so that the hooks and attributes it needs never
reach the user's. It is used for nested `Sequential`s of layers that it knows; anything else (attention, norms over
features, residuals, custom forwards) goes through `torch.func`.
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
    """x -> J (B, C, P) at θ̂, compared with plain autograd on the user's module at every training row.

    `backend` is the route in use: "backpack", "torch.func", or "autograd" where these disagree with it.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self._backpack = None
        if backpack_supports(network):
            with suppress(Exception):  # a module with an attribute that cannot be copied
                self._backpack = _BackpackRows(network)

    @property
    def backend(self) -> str:
        """The route in use."""
        if self._backpack is not None and not self.network.routes.first.get(_BACKPACK, 0):
            return "backpack"
        return "autograd" if self.network.routes.first.get("rows of J", 0) else "torch.func"

    def __call__(self, x: PyTree) -> Tensor:
        if self._backpack is None:
            return self.network.jacobian(x)
        rows = self._backpack
        routes = [("BackPACK", lambda: rows(x)), ("torch.func", lambda: self.network.jacobian(x))]
        difference = self.network.rows_difference(x, _BACKPACK)
        return self.network.first_agreeing(_BACKPACK, x, routes, difference, last_is_plain=False)


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
    """Zeros, in numbers: BackPACK ignores other modes, and "same" makes its convolutions over rows warn."""
    return getattr(module, "padding_mode", "zeros") == "zeros" and not isinstance(getattr(module, "padding", 0), str)


def _has_tied_parameters(module: nn.Module) -> bool:
    every = [id(p) for _, p in module.named_parameters(remove_duplicate=False)]
    return len(every) != len(set(every))


class _BackpackRows:
    """One backward pass an output, per-example gradients by BackPACK's BatchGrad."""

    def __init__(self, network: Network) -> None:
        from backpack import extend

        self.network = network
        self.module = copy.deepcopy(network.module)
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name in network.subset.shapes)
        _work_out_of_place(self.module)
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


def _work_out_of_place(module: nn.Module) -> None:
    """Activations that overwrite their input: backward hooks forbid it, and in a Sequential the values are the same."""
    for layer in module.modules():
        if getattr(layer, "inplace", False):
            layer.inplace = False  # type: ignore[assignment]


def _with_gradient(x: PyTree) -> PyTree:
    """x as a leaf that needs a gradient: BackPACK's module hooks fire fully only then.

    A dict holds the one argument of a Sequential by its name.
    """
    if isinstance(x, dict):
        (x,) = x.values()
    return x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
