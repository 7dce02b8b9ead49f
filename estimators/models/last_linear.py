"""Find the last linear layer: the `nn.Linear` whose output is the network's output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from estimators.errors import NoLastLayerError
from estimators.models.feature_reduction import FeatureReduction, Reduce, reduction_of
from estimators.models.kernels import differentiable
from estimators.models.outputs import output_tensor
from estimators.models.structural_copy import structural_copy
from estimators.numerics.pytrees import PyTree, copied, forward_arguments
from estimators.numerics.reductions import is_finite
from estimators.option_checks import shown
from estimators.runtime.module_wrappers import unwrap_children_, unwrapped

__all__ = ["LastLinear", "find_last_linear", "last_linear_names"]


_ROUND_OFF = 1e-4
"""Tolerance for reduced outputs: a mean may be summed in another order. The self-check is narrower."""


@dataclass(frozen=True)
class LastLinear:
    """The last linear layer by its name in the model.

    `weight` and `bias` are full parameter names; `bias` is None if it is absent or frozen.
    """

    name: str
    weight: str
    bias: str | None

    @property
    def parameter_names(self) -> list[str]:
        """The names of the trainable parameters, weight first."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]


def find_last_linear(
    model: nn.Module, x: PyTree, *, name: str | None = None, feature_reduction: FeatureReduction | None = None
) -> LastLinear:
    """Find the linear layer that produces the outputs of `model` at x; with `name`, check that it is this one.

    With a feature reduction, it is the layer whose reduced outputs are those of the model.

    Raises:
        NoLastLayerError: there is none, its weight is frozen, or its weight is tied to another layer.
    """
    module = unwrap_children_(structural_copy(unwrapped(model)))
    reduce = reduction_of(feature_reduction, module)
    found = _producers(module, x, reduce)
    if name is not None and name not in found:
        raise NoLastLayerError(
            f"a linear layer {name!r} whose output is the network's output",
            received=_listed(module, found),
            remedy="name the layer that ends the network, or leave last_layer_name out.",
        )
    if not found:
        raise _no_last_linear(module, feature_reduction)
    return _checked_layer(module, name or found[-1])


def _no_last_linear(module: nn.Module, feature_reduction: FeatureReduction | None) -> NoLastLayerError:
    """The error for a module none of whose linear layers produces the outputs, reduced if there is a reduction."""
    elsewhere = 'end the network in nn.Linear, or use LinearizedLaplace or RegVar with subset_of_weights="all"'
    if feature_reduction is None:
        return NoLastLayerError(
            "a network that ends in nn.Linear",
            received=_listed(module, []),
            remedy=f'{elsewhere}; LastLayerLaplace(feature_reduction="pick_last") for classifiers that apply the layer '
            "to every token.",
        )
    return NoLastLayerError(
        "an nn.Linear at every position, whose outputs become those of the network by "
        f"feature_reduction={shown(feature_reduction, 80)}",
        received=_listed(module, []),
        remedy=f"another feature_reduction, None if the layer has one position per row; or {elsewhere}.",
    )


def last_linear_names(model: nn.Module, x: PyTree) -> list[str]:
    """The parameter names of the last linear layer of `model` at x."""
    return find_last_linear(model, x).parameter_names


def _producers(module: nn.Module, x: PyTree, reduce: Reduce | None) -> list[str]:
    """The names of the linear layers whose output is what the network returns."""
    calls: list[tuple[str, Tensor]] = []

    def recorder(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _args, output: calls.append((name, output))

    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward:
            layer.register_forward_hook(recorder(name))
    f = _outputs(module, x)
    recorded = list(calls)  # the hooks record further calls below
    n_calls = Counter(name for name, _ in recorded)
    names = {name: output for name, output in recorded if _is_output(output, x, f, reduce)}
    once = {name: output for name, output in names.items() if n_calls[name] == 1}
    return [name for name, output in once.items() if _passes_through(module, name, x, f, output, reduce)]


def _is_output(output: Tensor, x: PyTree, f: Tensor, reduce: Reduce | None) -> bool:
    """Whether outputs of a layer, reduced, are the outputs f of the network."""
    if reduce is None:
        return output.shape == f.shape and torch.equal(output, f)
    if output.ndim != f.ndim + 1 or output.shape[-1] != f.shape[-1]:
        return False
    reduced = reduce(output, x)
    return reduced.shape == f.shape and torch.allclose(reduced, f, rtol=_ROUND_OFF, atol=_ROUND_OFF)


def _outputs(module: nn.Module, x: PyTree) -> Tensor:
    """The outputs of a module at x, without a graph."""
    arguments, keywords = forward_arguments(copied(x))  # a forward may write into its inputs
    with torch.no_grad(), differentiable():
        return output_tensor(module(*arguments, **keywords))


def _passes_through(module: nn.Module, name: str, x: PyTree, f: Tensor, output: Tensor, reduce: Reduce | None) -> bool:
    """Whether the network returns any output of the layer as reduced, also values beyond its outputs f (B, C) at x.

    Outputs that are empty or not finite cannot show this; the checks of the data reject them.
    """
    if not f.numel() or not is_finite(f):
        return True
    reach = min(1 + 10 * float(f.abs().max()), torch.finfo(f.dtype).max / 4)
    values = torch.linspace(-reach, reach, output.numel(), dtype=f.dtype, device=f.device).view_as(output)
    hook = module.get_submodule(name).register_forward_hook(lambda *_: values.clone(), prepend=True)
    try:
        found = _outputs(module, x)
        if reduce is None:
            return torch.equal(found, values)
        expected = reduce(values, x)
        return found.shape == expected.shape and torch.allclose(found, expected, rtol=_ROUND_OFF, atol=_ROUND_OFF)
    finally:
        hook.remove()


def _checked_layer(module: nn.Module, name: str) -> LastLinear:
    """The layer called `name`, after a check that its parameters are trainable and not shared."""
    layer = module.get_submodule(name)
    prefix = f"{name}." if name else ""
    if not isinstance(layer.weight, nn.Parameter) or not layer.weight.requires_grad:
        raise NoLastLayerError(
            f"a trainable weight in the last layer {name!r}",
            received="a frozen one (requires_grad=False)",
            remedy="layer.requires_grad_(True), or a subset over other weights.",
        )
    owners = _owners(module, layer.weight)
    if isinstance(layer.bias, nn.Parameter) and len(owners) == 1:
        owners = _owners(module, layer.bias)
    if len(owners) > 1:
        raise NoLastLayerError(
            f"a last layer {name!r} of its own",
            received=f"a weight or bias shared by {owners}",
            remedy='use subset_of_weights="all".',
        )
    bias = layer.bias if isinstance(layer.bias, nn.Parameter) and layer.bias.requires_grad else None
    return LastLinear(name, f"{prefix}weight", None if bias is None else f"{prefix}bias")


def _owners(module: nn.Module, parameter: Tensor) -> list[str]:
    """All names of a parameter in a module."""
    return [name for name, p in module.named_parameters(remove_duplicate=False) if p is parameter]


def _listed(module: nn.Module, found: list[str]) -> str:
    """The linear layers of a module, for an error message."""
    layers = [name or "(the model itself)" for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    return f"linear layers {layers}, of which {found} produce the output" if layers else "a network without nn.Linear"
