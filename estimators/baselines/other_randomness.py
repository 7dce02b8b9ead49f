"""Check that a network in train mode has no random operations outside of its dropout layers, such as F.dropout."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from estimators.baselines.dropout_layers import dropout_names
from estimators.baselines.random_operations import RandomOperations
from estimators.data.batch import Batch
from estimators.errors import RandomnessNotCheckedWarning, UnsupportedError
from estimators.models.failures import is_final_error, short
from estimators.models.kernels import differentiable
from estimators.models.network import Network
from estimators.models.preserved_state import preserved_tensors
from estimators.numerics.pytrees import cloned, forward_arguments, tensors_of
from estimators.runtime.rng import seeded_random_state

__all__ = ["check_other_randomness"]

_ROWS = 4
"""Rows of a forward pass: random operations are seen at any row, and masks of a row at one of a few."""
_SEEDS = 4
"""Forward passes of a network that draws no numbers from numpy or `random`, two of them at ends of uniform numbers."""
_MANY_SEEDS = 64
"""Forward passes of a network that does: a layer left out with a probability of .1 is missed in .1 % of the cases."""
_LABELS = ("labels", "label")
"""Names of the targets among the arguments of a forward, as among the entries of a batch."""


def check_other_randomness(network: Network, batch: Batch) -> None:
    """Check that in train mode nothing is random but the dropout layers.

    The network is run in train mode, but for its dropout layers. It may call no random operation of torch outside of
    them, except for uniform numbers that change no output, such as those compared with a rate of 0. Random numbers of
    numpy and `random` are only seen by outputs that differ between seeds. A forward that fails in train mode is called
    again with the labels, if it takes them. Buffers and modes of the network do not change.

    Args:
        network: the network.
        batch: inputs and targets of some rows.

    Raises:
        UnsupportedError: something else is random, which would stay off in the members of MC dropout.

    Warns:
        RandomnessNotCheckedWarning: the forward fails in train mode, or returns no tensor.
    """
    batch = batch.parts(_ROWS)[0]
    with _training_but_for_dropout(network.module):
        for keywords in _label_keywords(network.module, batch):
            first = _run(network, batch, keywords, seed=0)
            if first.random.names:
                raise _other_randomness(first.random.names)
            if first.tensors:
                _check_seeds(network, batch, keywords, first)
                return
    warnings.warn(
        "Expected a forward that returns a tensor in train mode, to check that nothing is random in it but the dropout "
        f"layers. Received {first.failure}. Anything else that is random, such as F.dropout, stays off, and the "
        "variance is too small. Try: a forward that needs no labels, or takes them as `labels`; or ignore "
        "RandomnessNotCheckedWarning if all dropout is by nn.Dropout modules",
        RandomnessNotCheckedWarning,
        stacklevel=2,
    )


@dataclass(frozen=True)
class _Pass:
    """What a forward pass returned, the random operations in it, and why there are no tensors if there are none."""

    tensors: list[Tensor]
    random: RandomOperations
    failure: str = ""


def _check_seeds(network: Network, batch: Batch, keywords: dict[str, Any], first: _Pass) -> None:
    """Raise UnsupportedError unless the outputs of all seeds, and at both ends of uniform numbers, are the same."""
    for seed in range(1, _MANY_SEEDS if first.random.outside_torch else _SEEDS):
        other = _run(network, batch, keywords, seed=seed)
        if other.random.names or not _agree(first.tensors, other.tensors):
            raise _other_randomness([*other.random.names, *other.random.uniform_names])


def _run(network: Network, batch: Batch, keywords: dict[str, Any], *, seed: int) -> _Pass:
    """Run the network once. Seeds 0 and 1 have all uniform numbers at their lower and upper end."""
    operations = RandomOperations(end=seed if seed < 2 else None)
    arguments, named = forward_arguments(cloned(batch.x))
    network.pass_counter.forward(len(batch))
    with torch.no_grad(), differentiable(), seeded_random_state(seed), preserved_tensors(network.module):
        try:
            with operations.recorded():
                output = network.module(*arguments, **named, **cloned(keywords))
        except Exception as error:  # the code of the user may raise anything
            if is_final_error(error):
                raise
            return _Pass([], operations, f"{type(error).__name__}: {short(error)}")
        # An unknown object has tensors as attributes; buffers among the outputs are restored afterwards.
        tensors = [t.clone() for t in tensors_of(output) or tensors_of(getattr(output, "__dict__", {}))]
    return _Pass(tensors, operations, f"an output of type {type(output).__name__}")


def _label_keywords(module: nn.Module, batch: Batch) -> Iterator[dict[str, Any]]:
    """Return no keywords, and then the labels if the forward takes them."""
    yield {}
    try:
        taken = inspect.signature(module.forward).parameters
    except (TypeError, ValueError):  # a forward that is no Python function
        return
    yield from [{name: batch.y} for name in _LABELS if name in taken]


@contextmanager
def _training_but_for_dropout(module: nn.Module) -> Iterator[None]:
    """Train mode, with frozen batch statistics and without the dropout layers."""
    modes, layers = [(part, part.training) for part in module.modules()], dropout_names(module)
    try:
        for name, part in module.named_modules():
            part.training = name not in layers and not isinstance(part, _NormBase)
        yield
    finally:
        for part, training in modes:
            part.training = training


def _agree(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether the outputs of two passes are the same."""
    return len(first) == len(second) and all(map(_same, first, second))


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether tensors are the same up to the round-off of kernels that add in any order."""
    if first.shape != second.shape or not (first.is_floating_point() or first.is_complex()):
        return torch.equal(first, second)
    finite = first[first.isfinite()]
    tolerance = torch.finfo(first.dtype).eps ** 0.75 * float(finite.abs().max()) if len(finite) else 0.0
    return torch.allclose(first, second, rtol=0, atol=tolerance, equal_nan=True)


def _other_randomness(names: list[str]) -> UnsupportedError:
    return UnsupportedError(
        "a network in which only dropout layers (nn.Dropout and its variants) are random in train mode",
        received=f"random calls outside of them, which would stay off: {', '.join(names) or 'not of torch'}",
        remedy="nn.Dropout modules in place of torch.nn.functional.dropout; "
        'attn_implementation="sdpa" for a Hugging Face model, whose attention dropout then stays off; a rate of 0 for '
        "what else should stay off, such as stochastic depth; or DeepEnsemble, or SWAG.",
    )
