"""Which parameters a posterior is over: a choice of names, and the flat vector θ that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from estimators.errors import OptionError

__all__ = ["Subset", "SubsetSpec", "delta_of_names", "matching_names"]

SubsetSpec = str | Sequence[str]


@dataclass(frozen=True)
class Subset:
    """Named parameters in a fixed order, and the map between them and one flat vector θ (P,)."""

    shapes: dict[str, torch.Size]

    @classmethod
    def of(cls, model: nn.Module, names: Sequence[str]) -> Subset:
        """The subset with these names, in the model's own order."""
        chosen = set(names)
        return cls({name: p.shape for name, p in model.named_parameters() if name in chosen})

    @property
    def sizes(self) -> list[int]:
        """Number of entries of each parameter."""
        return [shape.numel() for shape in self.shapes.values()]

    @property
    def n_parameters(self) -> int:
        """P."""
        return sum(self.sizes)

    @property
    def slices(self) -> dict[str, slice]:
        """Where each parameter lies in θ."""
        places, start = {}, 0
        for name, size in zip(self.shapes, self.sizes, strict=True):
            places[name] = slice(start, start + size)
            start += size
        return places

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Named tensors -> θ (P,)."""
        return torch.cat([tensors[name].reshape(-1) for name in self.shapes])

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """θ (P,) -> named views of it."""
        parts = theta.split(self.sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def mask(self, names: Sequence[str]) -> Tensor:
        """(P,) bool: true where θ belongs to one of `names`."""
        mask = torch.zeros(self.n_parameters, dtype=torch.bool)
        for name in names:
            mask[self.slices[name]] = True
        return mask


def matching_names(model: nn.Module, spec: SubsetSpec) -> list[str]:
    """Trainable parameter names for "all", a glob or a list of globs.

    Frozen parameters (requires_grad=False) are outside every subset.
    """
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    globs = ["*"] if spec == "all" else [spec] if isinstance(spec, str) else list(spec)
    names = [name for name in trainable if any(fnmatchcase(name, glob) for glob in globs)]
    if not names:
        listed = ", ".join(trainable[:8]) + (", ..." if len(trainable) > 8 else "") if trainable else "none"
        raise OptionError(
            "subset_of_weights that matches at least one trainable parameter",
            received=f"{spec!r}, which matches none",
            remedy=f'"all", "last_layer", or a glob over the trainable parameters: {listed}.',
        )
    return names


def delta_of_names(value: float | Mapping[str, float], subset: Subset, like: Tensor) -> Tensor:
    """δ (P,), of the dtype and device of `like`, from a number or a mapping {glob: number}; the first match counts."""
    if not isinstance(value, Mapping):
        return torch.full_like(like, value)
    vector = torch.empty_like(like)
    for name, place in subset.slices.items():
        matches = [number for glob, number in value.items() if fnmatchcase(name, glob)]
        if not matches:
            raise OptionError(
                "a prior_precision for every parameter of the subset",
                received=f"a mapping {dict(value)!r} without a match for {name!r}",
                remedy='add an entry "*" as the last one.',
            )
        vector[place] = matches[0]
    return vector
