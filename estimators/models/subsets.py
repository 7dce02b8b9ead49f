"""The choice of the parameters that a posterior is over, and the flat vector θ of their entries."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from estimators.errors import OptionError
from estimators.option_checks import PriorOption, shown
from estimators.runtime.module_wrappers import parameter_aliases, parameter_names

__all__ = [
    "Subset",
    "SubsetSpec",
    "checked_subset",
    "complex_of",
    "delta_of_names",
    "matching_names",
    "mean_of_names",
]

SubsetSpec = str | Sequence[str]
Aliases = dict[str, list[str]]
_WILDCARDS = str.maketrans("", "", "*?[]!")
"""Removes the wildcards of a glob, to compare it with parameter names."""


@dataclass(frozen=True)
class Subset:
    """Named parameters in a fixed order, and the map between them and one flat vector θ (P,).

    Attributes:
        shapes: the shapes of the parameters, by name.
        aliases: all names of every parameter of the model, inside or outside of the subset, by its first name. A tied
            weight has several names.
        complex_names: the names of complex parameters. θ has two entries per complex entry, real and imaginary part.
    """

    shapes: dict[str, torch.Size]
    aliases: Aliases = field(default_factory=dict)
    complex_names: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: nn.Module, names: Sequence[str]) -> Subset:
        """The subset with these names, in the model's own order."""
        chosen, parameters = set(names), dict(model.named_parameters())
        found = {name: parameters[own] for name, own in parameter_names(model).items() if name in chosen}
        pairs = frozenset(name for name, p in found.items() if p.is_complex())
        return cls({name: p.shape for name, p in found.items()}, parameter_aliases(model), pairs)

    @property
    def sizes(self) -> list[int]:
        """The number of entries of θ per parameter."""
        return [shape.numel() * (1 + (name in self.complex_names)) for name, shape in self.shapes.items()]

    def n_entries(self, names: Iterable[str]) -> int:
        """How many entries of θ these parameters have together."""
        return sum(self.entries[name] for name in names)

    @property
    def entries(self) -> dict[str, int]:
        """The number of entries of θ, by parameter."""
        return dict(zip(self.shapes, self.sizes, strict=True))

    @property
    def n_parameters(self) -> int:
        """P, the number of entries of θ."""
        return sum(self.sizes)

    @property
    def slices(self) -> dict[str, slice]:
        """The slice of θ that each parameter has."""
        slices, start = {}, 0
        for name, size in zip(self.shapes, self.sizes, strict=True):
            slices[name] = slice(start, start + size)
            start += size
        return slices

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Named tensors as θ (P,)."""
        parts = (tensors[name].resolve_conj() for name in self.shapes)
        return torch.cat([(torch.view_as_real(p) if p.is_complex() else p).reshape(-1) for p in parts])

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """θ (P,) as named views of it; new tensors for complex parameters."""
        parts = zip(self.shapes.items(), theta.split(self.sizes), strict=True)
        return {
            name: complex_of(part.view(*shape, 2)) if name in self.complex_names else part.view(shape)
            for (name, shape), part in parts
        }

    def mask(self, names: Sequence[str]) -> Tensor:
        """A mask (P,) of bool: whether the entry of θ belongs to one of `names`."""
        mask = torch.zeros(self.n_parameters, dtype=torch.bool)
        for name in names:
            mask[self.slices[name]] = True
        return mask


def complex_of(pairs: Tensor) -> Tensor:
    """Pairs of real numbers (..., 2) as complex numbers (...), whatever their strides."""
    return torch.complex(pairs[..., 0], pairs[..., 1])


def checked_subset(spec: SubsetSpec) -> str | list[str]:
    """Check the option `subset_of_weights`, and return it as a string or a list of globs.

    Raises:
        OptionError: for anything else than a string or a sequence of strings.
    """
    if isinstance(spec, str):
        return spec
    if isinstance(spec, Sequence) and len(spec) and all(isinstance(glob, str) for glob in spec):
        return list(spec)
    raise OptionError(
        'subset_of_weights "all", "last_layer", a glob over parameter names or a list of globs',
        received=shown(spec),
        remedy='subset_of_weights="all".',
    )


def matching_names(model: nn.Module, spec: SubsetSpec) -> list[str]:
    """Return the names of the trainable parameters that "all", a glob or a list of globs chooses, in the model's order.

    Frozen parameters (requires_grad=False) are outside of every subset. A tied parameter is chosen by any of its names,
    and listed by its first. Names are those inside torch.compile and DataParallel.

    Raises:
        OptionError: for a glob that chooses no trainable parameter.
    """
    parameters, aliases = dict(model.named_parameters()), parameter_aliases(model)
    trainable = {name: aliases[name] for name, own in parameter_names(model).items() if parameters[own].requires_grad}
    globs = ["*"] if spec == "all" else [spec] if isinstance(spec, str) else list(spec)
    for glob in globs:
        if not any(_matches(glob, names) for names in trainable.values()):
            raise _chooses_nothing(glob, aliases, trainable)
    return [name for name, names in trainable.items() if any(_matches(glob, names) for glob in globs)]


def delta_of_names(value: PriorOption, subset: Subset, like: Tensor) -> Tensor:
    """Return δ (P,) from a number, a tensor (P,) or a mapping from globs."""
    return _entries_of_names("prior_precision", value, subset, like)


def mean_of_names(value: PriorOption, subset: Subset, like: Tensor, module: nn.Module) -> Tensor:
    """Return θ₀ (P,) from a number, a tensor (P,) or a mapping from globs.

    A state dict also has buffers and further names of tied weights, which decide on no entry of θ.
    """
    buffers = dict(module.named_buffers(remove_duplicate=False))
    ignored = {*buffers, *(name for names in subset.aliases.values() for name in names[1:])}
    return _entries_of_names("prior_mean", value, subset, like, ignored=ignored)


def _entries_of_names(
    option: str, value: PriorOption, subset: Subset, like: Tensor, *, ignored: Collection[str] = ()
) -> Tensor:
    """Return a vector (P,), of the dtype and device of `like`, from a number, a tensor (P,) or a mapping from globs.

    The first glob that matches one of a parameter's names decides its entries: a number for all of them, or a tensor
    of the parameter's shape. A glob may decide on parameters outside of the subset only, so that one mapping serves
    several subsets of a model.

    Args:
        option: the name of the option, for messages.
        value: the option.
        subset: the chosen parameters.
        like: a tensor (P,).
        ignored: keys of a mapping that need not decide on a parameter, such as the buffers of a state dict.

    Raises:
        OptionError: for a tensor of another shape, for a parameter of the subset without a match, and for a glob that
            decides on no parameter of the model: it matches none, or earlier globs have decided on all that it matches.
    """
    if isinstance(value, Tensor):
        if value.shape != like.shape or value.is_complex():
            raise OptionError(
                f"{option}, a tensor ({len(like)},) with a number for each weight of the subset",
                received=f"a tensor of shape {tuple(value.shape)} and {value.dtype}",
                remedy="a mapping {name of a parameter: tensor of its shape}, or one number.",
            )
        return value.to(like)
    if not isinstance(value, Mapping):
        return torch.full_like(like, value)
    deciding = {name: _first_match(value, names) for name, names in subset.aliases.items()}
    for glob in value:
        if glob not in deciding.values() and glob not in ignored:
            raise _decides_nothing(option, glob, value, subset.aliases)
    vector = torch.empty_like(like)
    for name, entries in subset.slices.items():
        decided_by = deciding[name]
        if decided_by is None:
            raise OptionError(
                f"a {option} for every parameter of the subset",
                received=f"a mapping from {', '.join(map(repr, value))} without a match for {name!r}",
                remedy='add an entry "*" as the last one.',
            )
        vector[entries] = _entries(option, value[decided_by], subset, name).to(like)
    return vector


def _entries(option: str, value: float | Tensor, subset: Subset, name: str) -> Tensor:
    """Return the entries of a parameter in θ, from a number or a tensor of its shape."""
    size, shape = subset.entries[name], subset.shapes[name]
    if not isinstance(value, Tensor):
        return torch.full((size,), value, dtype=torch.float64)
    if value.shape != shape or (value.is_complex() and name not in subset.complex_names):
        raise OptionError(
            f"a {option} of the shape {tuple(shape)} of {name!r}, or a number",
            received=f"a tensor of shape {tuple(value.shape)} and {value.dtype}",
            remedy="torch.full_like(parameter, value).",
        )
    if value.is_complex():
        return torch.view_as_real(value).flatten()
    return value.flatten().repeat_interleave(size // max(1, value.numel()))  # real and imaginary part alike


def _matches(glob: str, names: Iterable[str]) -> bool:
    """Whether a glob matches one of the names."""
    return any(fnmatchcase(name, glob) for name in names)


def _first_match(globs: Iterable[str], names: Collection[str]) -> str | None:
    """The first glob that matches one of the names; None if none does."""
    return next((glob for glob in globs if _matches(glob, names)), None)


def _chooses_nothing(glob: str, aliases: Aliases, trainable: Aliases) -> OptionError:
    """The error for a glob of `subset_of_weights` that matches no trainable parameter."""
    frozen = [name for name, names in aliases.items() if name not in trainable and _matches(glob, names)]
    why = "none" + (f" but frozen ones, such as {frozen[0]!r}" if frozen else "")
    return OptionError(
        "subset_of_weights whose globs each match a trainable parameter",
        received=f"{glob!r}, which matches {why}",
        remedy=f'"all", "last_layer", or a glob over the trainable parameters: {_nearest(glob, trainable)}.',
    )


def _decides_nothing(option: str, glob: str, value: Mapping[str, float | Tensor], aliases: Aliases) -> OptionError:
    """The error for a glob that decides on no parameter."""
    matched = [name for name, names in aliases.items() if _matches(glob, names)]
    if not matched:
        return OptionError(
            f"{option} whose globs each match a parameter of the model",
            received=f"{glob!r}, which matches none",
            remedy=f"a glob over the names of the parameters, such as {_nearest(glob, aliases)}.",
        )
    earlier = sorted({repr(_first_match(value, aliases[name])) for name in matched})
    return OptionError(
        f"{option} whose globs each decide on a parameter of the model; the first match counts",
        received=f"{glob!r}, all of whose matches ({_listed(matched)}) are decided by {', '.join(earlier)} before it",
        remedy=f"put {glob!r} before these, or leave it out.",
    )


def _nearest(glob: str, aliases: Aliases) -> str:
    """The parameter names most similar to a glob, for an error message."""
    names = [name for several in aliases.values() for name in several]
    near = get_close_matches(glob.translate(_WILDCARDS), names, n=3, cutoff=0.3)
    return _listed([*near, *(name for name in names if name not in near)]) if names else "none"


def _listed(names: Sequence[str]) -> str:
    """The first names, for an error message."""
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
