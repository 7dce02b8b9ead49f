"""A fit as plain data: tensors and a description, saved by safetensors and checked when loaded. No pickle.

A state is a flat dict: tensors by name, and under "about" a JSON text with what they belong to: the estimator and its
options, a digest of the model, and the number of rows and sums of the training data. Loading refuses what differs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from estimators.atomic import write_bytes
from estimators.errors import ModelChangedError, StateError
from estimators.sums import Sums

__all__ = ["ABOUT", "PROGRESS", "About", "FittedState", "Learned", "digest", "read_file", "write_file"]

ABOUT, PROGRESS = "about", "progress"
FORMAT = 1
FittedState = dict[str, Tensor | str]
Learned = tuple[dict[str, Tensor], dict[str, Any]]


@dataclass(frozen=True)
class About:
    """What the tensors of a state belong to; `learned` is the estimator's own, in JSON types.

    `shared_inputs` are the paths of the input tensors that the rows of a batch share.
    """

    estimator: str
    options: dict[str, str]
    parameters: list[str]
    model: str
    n_data: int
    sums: Sums
    learned: dict[str, Any]
    shared_inputs: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """The text under "about"."""
        return json.dumps({"format": FORMAT, **asdict(self)})

    @classmethod
    def of(cls, state: Mapping[str, Tensor | str]) -> About:
        """Read from a state. Errors: StateError for anything else."""
        text = state.get(ABOUT)
        try:
            content = json.loads(text) if isinstance(text, str) else {}
            if content.pop("format", None) != FORMAT:
                raise TypeError
            return cls(**{**content, "sums": Sums(**content["sums"])})
        except (ValueError, TypeError, KeyError, AttributeError):
            raise StateError(
                f'a fitted state of format {FORMAT}, from state_dict() or save(), with its "about"',
                received=f"a {type(state).__name__} with entries {sorted(map(str, state))[:5]}",
                remedy="fit again and save, or load it with the version that wrote it.",
            ) from None

    @property
    def unfinished(self) -> bool:
        """Whether it is a checkpoint of a fit on its way."""
        return PROGRESS in self.learned

    def finished(self) -> dict[str, Any]:
        """`learned` of a whole fit. Errors: StateError where it is on its way."""
        if self.unfinished:
            raise StateError(
                "a finished fit",
                received="the checkpoint of one that was interrupted",
                remedy="go on with it: estimator.fit(train_loader, checkpoint=path).",
            )
        return self.learned

    def check(self, expected: About) -> None:
        """Refuse a state of another estimator, other options or another model; `expected` is of the one at hand."""
        if self.estimator != expected.estimator:
            raise StateError(
                f"a state of {expected.estimator}", received=f"one of {self.estimator}", remedy="load it into that."
            )
        names = self.options.keys() | expected.options.keys()
        differing = [name for name in sorted(names) if self.options.get(name) != expected.options.get(name)]
        if differing:
            listed = "; ".join(f"{name}: {self.options.get(name)} there" for name in differing)
            here = "; ".join(f"{name}={expected.options.get(name)}" for name in differing)
            raise StateError(
                f"a state fitted with the options of this estimator, {here}",
                received=listed,
                remedy="construct the estimator with the options that were fitted, or fit again.",
            )
        if self.model != expected.model:
            raise ModelChangedError(
                "the model that was fitted",
                received="one whose weights or buffers differ from it",
                remedy="load the weights of that training first, or fit again.",
            )


def digest(model: nn.Module) -> str:
    """SHA-256 of names, shapes, dtypes and bytes of all parameters and buffers, on whatever device they are."""
    sha = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            values = tensor.detach().cpu().contiguous()
            sha.update(f"{name}{tuple(values.shape)}{values.dtype}".encode())
            sha.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def write_file(state: FittedState, path: str | Path) -> None:
    """One safetensors file, whole or not at all."""
    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in state.items() if isinstance(t, Tensor)}
    about = state[ABOUT]
    assert isinstance(about, str)
    write_bytes(Path(path), safetensors.torch.save(tensors, metadata={ABOUT: about}))


def read_file(path: str | Path) -> FittedState:
    """The state in a file. Errors: StateError where it is none; FileNotFoundError."""
    if not Path(path).exists():
        raise FileNotFoundError(f"no fitted state at {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get(ABOUT, "")
            return {**{name: file.get_tensor(name) for name in file.keys()}, ABOUT: about}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise StateError(
            "a safetensors file", received=f"{path}: {error}", remedy="save the fitted estimator again."
        ) from error
