"""Checksum of a network's weights and buffers, to check before a query that it is still the network that was fitted."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from estimators.errors import ModelChangedError
from estimators.persistence.checksums import digest
from estimators.runtime.module_wrappers import named_tensors

__all__ = ["WeightChecksum", "check_unchanged", "weight_checksum"]

WeightChecksum = dict[str, Tensor | bytes | None]
"""By name: None (compared with a tensor kept elsewhere), a copy of a short tensor, or the digest of a long one."""
_SHORT = 2**14
"""Entries up to which a tensor is copied: comparing a copy of this size costs less than a digest."""
_CHUNK = 2**16
"""Entries compared at a time, so that both operands stay in the cache."""
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weight_checksum(model: nn.Module, kept: Mapping[str, Tensor] | None = None) -> WeightChecksum:
    """Return the checksum of every parameter and buffer.

    Args:
        model: the network.
        kept: tensors that the caller keeps, by name: the checksum has None for those that are equal to the model's.

    Returns:
        The checksum by name of the tensor.
    """
    kept = kept or {}

    def known(name: str, tensor: Tensor) -> Tensor | bytes | None:
        if name in kept and _equals(tensor, kept[name]):  # hooks may show others than the parameters
            return None
        return tensor.clone() if tensor.numel() <= _SHORT else _digest(tensor)

    return {name: known(name, tensor) for name, tensor in named_tensors(model).items()}


def check_unchanged(model: nn.Module, expected: WeightChecksum, kept: Mapping[str, Tensor] | None = None) -> None:
    """Check that every weight and buffer is still the one that was fitted, bit by bit.

    Args:
        model: the network.
        expected: its checksum when it was fitted.
        kept: the tensors that `weight_checksum` was given.

    Raises:
        ModelChangedError: a tensor has other values, is missing, or is new.
    """
    tensors = named_tensors(model)
    known = {name: (kept or {})[name] if it is None else it for name, it in expected.items()}
    missing = known.keys() - tensors.keys()
    other = [name for name, tensor in tensors.items() if name not in known or not _equals(tensor, known[name])]
    if missing or other:
        changed = sorted([*missing, *other])
        raise ModelChangedError(
            "the model as it was fitted",
            received=f"changed weights or buffers: {', '.join(changed[:5])}" + (", ..." if len(changed) > 5 else ""),
            remedy="fit again, or restore the weights.",
        )


def _equals(tensor: Tensor, known: Tensor | bytes) -> bool:
    if isinstance(known, bytes):
        return _digest(tensor) == known
    if tensor.dtype != known.dtype or tensor.shape != known.shape:
        return False
    known = known.to(tensor.device)
    if tensor.numel() <= _SHORT or tensor.device.type != "cpu":
        return torch.equal(tensor, known) or torch.equal(_bits(tensor), _bits(known))  # NaN is not NaN
    ours, theirs = _bits(tensor).numpy(), _bits(known).numpy()  # numpy's comparison takes a third of the time
    return all(np.array_equal(ours[i : i + _CHUNK], theirs[i : i + _CHUNK]) for i in range(0, len(ours), _CHUNK))


def _digest(tensor: Tensor) -> bytes:
    return digest(f"{tensor.dtype}{tuple(tensor.shape)}", tensor)


def _bits(tensor: Tensor) -> Tensor:
    """Return the entries as one row of whole numbers, so that NaN equals NaN."""
    row = tensor.resolve_conj().resolve_neg().flatten().contiguous()
    row = torch.view_as_real(row).flatten() if row.is_complex() else row
    return row.view(_WHOLE[row.element_size()])
