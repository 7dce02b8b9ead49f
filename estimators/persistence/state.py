"""A fit as plain data: tensors and a description, saved by safetensors and checked when loaded. No pickle.

A state is a flat dict: tensors by name, and under "about" a JSON text with what they belong to: the estimator and its
options by value, a digest of the model, and the number of rows and sums of the training data. Loading raises StateError
for what differs. The result of `tune` has its calibration and its table under "tuning", and a fit with validation rows
under "calibration".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from estimators.errors import ModelChangedError, StateError
from estimators.persistence.atomic import write_bytes
from estimators.persistence.checksums import DatasetChecksum, digest
from estimators.persistence.option_values import differences
from estimators.runtime.module_wrappers import named_tensors

__all__ = [
    "ABOUT",
    "CALIBRATION",
    "PROGRESS",
    "TUNING",
    "About",
    "FittedState",
    "Learned",
    "model_digest",
    "read_file",
    "write_file",
]

ABOUT, TUNING, PROGRESS, CALIBRATION = "about", "tuning", "progress", "calibration"
FORMAT = 2
_ORDERS = "orders in memory"
FittedState = dict[str, Tensor | str]
Learned = tuple[dict[str, Tensor], dict[str, Any]]


@dataclass(frozen=True)
class About:
    """Description of what the tensors of a state belong to; `learned` are the estimator's values, in JSON types.

    `options` are described by `estimators.persistence.option_values`; `shared_inputs` are the paths of the input
    tensors that the rows of a batch share.
    """

    estimator: str
    options: dict[str, Any]
    parameters: list[str]
    model: str
    n_data: int
    checksum: DatasetChecksum
    learned: dict[str, Any]
    derivatives: dict[str, Any] = field(default_factory=dict)  # what was compared with plain autograd
    shared_inputs: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """Return the text under "about"."""
        return json.dumps({"format": FORMAT, **asdict(self)})

    @classmethod
    def of(cls, state: Mapping[str, Tensor | str]) -> About:
        """Read the description from a state; raise StateError for anything else."""
        text = state.get(ABOUT)
        try:
            content = json.loads(text) if isinstance(text, str) else {}
            if content.pop("format", None) == FORMAT:
                return cls(**{**content, "checksum": DatasetChecksum(**content["checksum"])})
        except (ValueError, TypeError, KeyError, AttributeError):
            pass
        raise StateError(
            f'a fitted state of format {FORMAT}, from state_dict() or save(), with its "about"',
            received=f"a {type(state).__name__} with entries {sorted(map(str, state))[:5]}",
            remedy="fit again and save, or load it with the version that wrote it.",
        )

    @property
    def unfinished(self) -> bool:
        """Whether the state is a checkpoint of an unfinished fit."""
        return PROGRESS in self.learned

    def finished(self) -> dict[str, Any]:
        """Return `learned` of a finished fit; raise StateError for a checkpoint."""
        if self.unfinished:
            raise StateError(
                "a finished fit",
                received="the checkpoint of one that was interrupted",
                remedy="continue it: estimator.fit(train_loader, checkpoint=path).",
            )
        return self.learned

    def check(self, estimator: str, options: dict[str, Any], model: str) -> None:
        """Raise StateError or ModelChangedError for a state of another estimator, other options or another model."""
        if self.estimator != estimator:
            raise StateError(
                f"a state of {estimator}", received=f"one of {self.estimator}", remedy="load it into that."
            )
        names = dict.fromkeys([*options, *self.options])
        found = [differences(self.options.get(name), options.get(name), name) for name in names]
        differing = [difference for several in found for difference in several]
        if differing:
            raise StateError(
                f"a state fitted with the options of this estimator, {'; '.join(f'{n}={h}' for n, _, h in differing)}",
                received="; ".join(f"{name}={there}" for name, there, _ in differing),
                remedy="construct the estimator with the options that were fitted, or fit again.",
            )
        if self.model != model:
            raise ModelChangedError(
                "the model that was fitted",
                received="one whose layers, weights or buffers differ from it",
                remedy="load the weights of that training first, or fit again.",
            )


def model_digest(model: nn.Module) -> str:
    """Return the SHA-256 of the classes of layers, and names, shapes, dtypes and bytes of all parameters and buffers.

    Names are those inside wrappers, so that a compiled model has the digest of the plain one. Layers are modules
    without submodules: another activation has no tensors, and is another function.
    """
    parts: list[str | Tensor] = [" ".join(type(m).__name__ for m in model.modules() if not m._modules)]
    for name, tensor in named_tensors(model).items():
        parts += [f"{name}{tuple(tensor.shape)}{tensor.dtype}", tensor]
    return digest(*parts).hex()


def write_file(state: FittedState, path: str | Path) -> None:
    """Write a state to a safetensors file atomically."""
    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in state.items() if isinstance(t, Tensor)}
    orders = {name: order for name, t in state.items() if isinstance(t, Tensor) and (order := _order(t)) is not None}
    texts = {name: text for name, text in state.items() if isinstance(text, str)} | {_ORDERS: json.dumps(orders)}
    write_bytes(Path(path), safetensors.torch.save(tensors, metadata=texts))


def read_file(path: str | Path) -> FittedState:
    """Return the state in a file; raise StateError for another file, FileNotFoundError for none."""
    if not Path(path).exists():
        raise FileNotFoundError(f"no fitted state at {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            texts = {ABOUT: "", **(file.metadata() or {})}
            orders = json.loads(texts.pop(_ORDERS, "{}"))
            # Copies: products with memory of another alignment round differently.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return {**{name: _ordered(t, orders.get(name)) for name, t in tensors.items()}, **texts}
    except (OSError, safetensors.SafetensorError) as error:
        raise StateError(
            "a safetensors file", received=f"{path}: {error}", remedy="save the fitted estimator again."
        ) from error


def _order(tensor: Tensor) -> list[int] | None:
    """Return the dimensions of a dense tensor from the slowest to the fastest in memory; None for the usual order."""
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return None if tensor.is_contiguous() or not tensor.permute(order).is_contiguous() else order


def _ordered(tensor: Tensor, order: list[int] | None) -> Tensor:
    """Return the tensor with that order in memory: sums over other strides round differently."""
    if order is None:
        return tensor
    inverse = [order.index(dim) for dim in range(tensor.ndim)]
    return tensor.permute(order).contiguous().permute(inverse)
