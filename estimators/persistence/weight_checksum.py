"""Is this network still the one that was fitted: its weights and buffers, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from estimators.errors import ModelChangedError
from estimators.runtime.module_wrappers import named_tensors

__all__ = ["Fingerprint", "refuse_if_changed", "weight_checksum"]

Fingerprint = dict[str, Tensor | int | None]
_SHORT, _PIECE = 2**14, 2**16
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_STRIDES, _RUN = 16, 64
_TABLE = _STRIDES * _RUN
_ODD = 0x9E3779B97F4A7C15


def weight_checksum(model: nn.Module, kept: Mapping[str, Tensor] | None = None) -> Fingerprint:
    """Every parameter and buffer: None for what is `kept` elsewhere; a copy of a short one, a hash of a long one."""
    kept = kept or {}

    def known(name: str, tensor: Tensor) -> Tensor | int | None:
        if name in kept and _is(tensor, kept[name]):  # hooks may show others than the parameters
            return None
        return tensor.clone() if tensor.numel() <= _SHORT else _hash(_words(tensor))

    return {name: known(name, tensor) for name, tensor in named_tensors(model).items()}


def refuse_if_changed(model: nn.Module, expected: Fingerprint, kept: Mapping[str, Tensor] | None = None) -> None:
    """ModelChangedError where a weight or buffer differs from the fitted one."""
    tensors = named_tensors(model)
    known = {name: (kept or {})[name] if it is None else it for name, it in expected.items()}
    missing = known.keys() - tensors.keys()
    other = [name for name, tensor in tensors.items() if name not in known or not _is(tensor, known[name])]
    if missing or other:
        changed = sorted([*missing, *other])
        raise ModelChangedError(
            "the model as it was fitted",
            received=f"changed weights or buffers: {', '.join(changed[:5])}" + (", ..." if len(changed) > 5 else ""),
            remedy="fit again, or restore the weights.",
        )


def _is(tensor: Tensor, known: Tensor | int) -> bool:
    if isinstance(known, int):
        return _hash(_words(tensor)) == known
    if tensor.dtype != known.dtype or tensor.shape != known.shape:
        return False
    known = known.to(tensor.device)
    if tensor.numel() <= _SHORT or tensor.device.type != "cpu":
        return torch.equal(tensor, known) or torch.equal(_bits(tensor), _bits(known))  # NaN is not NaN
    ours, theirs = _bits(tensor).numpy(), _bits(known).numpy()  # numpy's comparison takes a third of the time
    return all(np.array_equal(ours[i : i + _PIECE], theirs[i : i + _PIECE]) for i in range(0, len(ours), _PIECE))


def _bits(tensor: Tensor) -> Tensor:
    """A row of whole numbers, NaN or not."""
    row = tensor.flatten() if tensor.is_contiguous() and not tensor.is_complex() else _row(tensor)
    return row.view(_WHOLE[row.element_size()])


def _row(tensor: Tensor) -> Tensor:
    flat = tensor.resolve_conj().resolve_neg().flatten().contiguous()
    return torch.view_as_real(flat).flatten() if flat.is_complex() else flat


def _words(tensor: Tensor) -> Tensor:
    """The bits as int64, filled up with zeros."""
    row = _row(tensor)
    in_a_word = max(1, 8 // row.element_size())
    if len(row) % in_a_word or row.storage_offset() % in_a_word:
        row = torch.cat([row, row.new_zeros(-len(row) % in_a_word)])
    return row.view(torch.int64)


def _hash(words: Tensor) -> int:
    """Piece by piece: a change goes into all that follows."""
    found = len(words)
    for piece in words.split(_piece(words.device)):
        for part in _sums(piece.bitwise_right_shift(31).bitwise_xor_(piece)):  # sign bits alone cancel in pairs
            found = (found * _ODD + _weighted(part)) % 2**64
    return found


def _piece(device: torch.device) -> int:
    """Words at a time: as many as stay in a cache; elsewhere, as few calls as need be."""
    return 2**17 if device.type == "cpu" else 2**24


def _sums(words: Tensor) -> Iterator[Tensor]:
    """Of a long piece in strides and in runs, and what is left of it.

    Two words of one run are of two strides: what an exchange hides from one of the sums the other shows.
    """
    n = len(words) // _TABLE * _TABLE if len(words) > _SHORT else 0
    if n:
        yield words[:n].view(_STRIDES, -1).sum(0)
        yield words[:n].view(-1, _RUN).sum(1)
    if n < len(words):
        yield words[n:]


def _weighted(words: Tensor) -> int:
    """Σ of the words by random odd numbers, by which none of their bits is lost."""
    odd = _odd_numbers(words.device)[: len(words)]
    return int(torch.dot(words, odd) if words.device.type == "cpu" else (words * odd).sum())  # dot: no whole numbers


@lru_cache(maxsize=8)
def _odd_numbers(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    most = max(_SHORT, _piece(device) // _STRIDES)
    return torch.randint(-(2**63), 2**63 - 1, (most,), generator=generator).bitwise_or_(1).to(device)
