"""Models inside wrappers that change neither weights nor outputs: torch.compile, DataParallel, averaged models.

`torch.compile(model)` puts `_orig_mod.` before every parameter name, `nn.DataParallel(model)` puts `module.`. The names
that users write, that errors list and that files keep are those of the module inside, so that a fit of the one belongs
to the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from estimators.errors import ModelError

__all__ = ["named_tensors", "parameter_aliases", "parameter_names", "plain_names", "unwrap_children_", "unwrapped"]

_WITH_MODULE = (DataParallel, DistributedDataParallel, AveragedModel)  # they keep the model in `.module`
_COMPILED = "_orig_mod"


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside any number of wrappers; a model without a wrapper is returned as it is.

    Args:
        model: any module, for instance `torch.compile(net)` or `nn.DataParallel(net)`.

    Returns:
        The module whose parameters have the names that its author gave them. It is not a copy.

    Raises:
        ModelError: for a wrapper with hooks of its own, which the module inside would not run.
    """
    while (name := _inner_name(model)) is not None:
        _check_no_hooks(model)
        model = model.get_submodule(name)
    return model


def unwrap_children_(module: nn.Module) -> nn.Module:
    """Replace wrapped submodules by the modules inside, in place; only for copies of the model of a user."""
    for name, child in list(module._modules.items()):
        if child is None:
            continue
        inner = unwrapped(child)
        if inner is not child:
            setattr(module, name, inner)
        unwrap_children_(inner)
    return module


def plain_names(model: nn.Module, names: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Yield (name, name without wrappers) of each tensor that does not belong to a wrapper itself."""
    inside = {path: inner for path, m in model.named_modules(remove_duplicate=False) if (inner := _inner_name(m))}
    for name in names:
        plain = _plain_name(name, inside) if inside else name
        if plain is not None:
            yield name, plain


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of `model.state_dict()` by their names without wrappers.

    Buffers that belong to a wrapper itself (the count of an averaged model) are left out.
    """
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    return {plain: state[name] for name, plain in plain_names(model, state)}


def parameter_names(model: nn.Module) -> dict[str, str]:
    """Return the name that each parameter has in `model` itself, by its name without wrappers; a tied one once."""
    return {plain: name for name, plain in plain_names(model, dict(model.named_parameters()))}


def parameter_aliases(model: nn.Module) -> dict[str, list[str]]:
    """Return all names of each parameter, without wrappers, by its first one: tied weights have several."""
    by_identity: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, plain in plain_names(model, parameters):
        by_identity.setdefault(id(parameters[name]), []).append(plain)
    return {names[0]: names for names in by_identity.values()}


def _plain_name(name: str, inside: dict[str, str]) -> str | None:
    """None for a tensor of a wrapper itself."""
    path: list[str] = []
    kept: list[str] = []
    for part in name.split("."):
        inner = inside.get(".".join(path))
        path.append(part)
        if inner is None:
            kept.append(part)
        elif part != inner:
            return None
    return ".".join(kept)


def _inner_name(module: nn.Module) -> str | None:
    """The name of the module inside a wrapper; None for any other module."""
    if isinstance(module, _WITH_MODULE) and type(module).forward in [kind.forward for kind in _WITH_MODULE]:
        return "module"
    if type(module).__name__ == "OptimizedModule" and isinstance(module._modules.get(_COMPILED), nn.Module):
        return _COMPILED
    return None


def _check_no_hooks(wrapper: nn.Module) -> None:
    if wrapper._forward_hooks or wrapper._forward_pre_hooks or wrapper._backward_hooks:
        raise ModelError(
            "hooks on the model itself",
            received=f"hooks on the {type(wrapper).__name__} around it",
            remedy="register them on the module inside, before torch.compile or DataParallel.",
        )
