"""Is this network fit to be used: finite, deterministic, and still the one that was fitted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from estimators.errors import ModelChangedError, ModelError
from estimators.finite import is_finite

__all__ = ["Fingerprint", "check_model", "fingerprint", "mode_faults", "refuse_if_changed", "weight_faults"]

Sums = tuple[int, int, int]
_STRIDES, _RUN, _SHORT = 16, 64, 2**14
_TABLE = _STRIDES * _RUN  # a run is no longer than a stride, as every row longer than _SHORT is a few tables


def check_model(model: nn.Module) -> None:
    """ModelError for non-finite weights, several devices or dtypes, dropout or batch statistics in train mode."""
    for fault in (*weight_faults(model), *mode_faults(model)):
        raise fault


def weight_faults(model: nn.Module) -> list[ModelError]:
    """Several devices or dtypes, and non-finite weights, for which nothing can be computed."""
    kinds = {(p.dtype, p.device) for p in model.parameters() if p.is_floating_point()}
    if len(kinds) != 1:
        listed = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds)) or "no parameters"
        remedy = "model.to(device=..., dtype=...)."
        return [ModelError("parameters of one dtype on one device", received=listed, remedy=remedy)]
    return [
        ModelError("finite weights", received=f"NaN or Inf in {name!r}", remedy="train the model again.")
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor) and not is_finite(tensor)
    ]


def mode_faults(model: nn.Module) -> list[ModelError]:
    """Modules in train mode whose outputs would be random, or would depend on the other rows."""
    found = (_mode_fault(name, module) for name, module in model.named_modules() if module.training)
    return [fault for fault in found if fault is not None]


def _mode_fault(name: str, module: nn.Module) -> ModelError | None:
    dropout = module.p if isinstance(module, _DropoutNd) else getattr(module, "dropout", 0.0)
    if isinstance(dropout, float) and dropout > 0:
        return ModelError(
            "a deterministic network",
            received=f"{name!r} ({type(module).__name__}) in train mode with dropout {dropout}",
            remedy="call model.eval() before fit.",
        )
    if isinstance(module, _NormBase) and (module.track_running_stats or "Batch" in type(module).__name__):
        return ModelError(
            "normalisation with frozen statistics, so that rows do not depend on each other",
            received=f"{name!r} ({type(module).__name__}) in train mode",
            remedy="call model.eval() before fit.",
        )
    return None


@dataclass(frozen=True)
class Fingerprint:
    """Sums over the bits of every parameter and buffer: by name, and in one go, which alone is compared as a rule."""

    by_name: dict[str, Sums]
    at_once: tuple[Sums, ...]


def fingerprint(model: nn.Module) -> Fingerprint:
    """About a millisecond for 10⁷ numbers; any one change, and any exchange of two words, is seen."""
    tensors = _tensors(model)
    return Fingerprint({name: _sums(_words(t.flatten())) for name, t in tensors.items()}, _at_once(tensors))


def refuse_if_changed(model: nn.Module, expected: Fingerprint) -> None:
    """ModelChangedError where a weight or buffer differs from the fitted one."""
    tensors = _tensors(model)
    if _at_once(tensors) == expected.at_once and tensors.keys() == expected.by_name.keys():
        return
    found = fingerprint(model).by_name
    names = found.keys() | expected.by_name.keys()
    changed = sorted(name for name in names if found.get(name) != expected.by_name.get(name))
    raise ModelChangedError(
        "the model as it was fitted",
        received=f"changed weights or buffers: {', '.join(changed[:5])}" + (", ..." if len(changed) > 5 else ""),
        remedy="fit again, or restore the weights.",
    )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}


def _at_once(tensors: dict[str, Tensor]) -> tuple[Sums, ...]:
    """The sums of long tensors, and those of all short ones of one dtype and device joined."""
    short: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    sums = []
    for tensor in tensors.values():
        if tensor.numel() > _SHORT:
            sums.append(_sums(_words(tensor.flatten())))
        else:
            short.setdefault((tensor.dtype, tensor.device), []).append(tensor.flatten())
    return (*sums, *(_sums(_words(torch.cat(alike))) for alike in short.values()))


def _words(flat: Tensor) -> Tensor:
    """The bits as int64, filled up with zeros."""
    flat = torch.view_as_real(flat).flatten() if flat.is_complex() else flat
    in_a_word = max(1, 8 // flat.element_size())
    if len(flat) % in_a_word or flat.storage_offset() % in_a_word:
        flat = torch.cat([flat, flat.new_zeros(-len(flat) % in_a_word)])
    return flat.view(torch.int64)


def _sums(words: Tensor) -> Sums:
    """Of words by odd numbers, so that no bit is lost: of a long row's in strides, in runs, and of what is left.

    Two words of one run are of two strides: what an exchange hides from one sum the other shows.
    """
    n = len(words) // _TABLE * _TABLE if len(words) > _SHORT else 0
    long, left = words[:n], words[n:]
    strides, runs = (_weighted(long.view(_STRIDES, -1).sum(0)), _weighted(long.view(-1, _RUN).sum(1))) if n else (0, 0)
    return strides, runs, _weighted(left)


def _weighted(words: Tensor) -> int:
    n = len(words)
    if not n:
        return 0
    odd = _odd_numbers(max(n, _SHORT), words.device)[:n]
    return int(torch.dot(words, odd) if words.device.type == "cpu" else (words * odd).sum())  # dot: no whole numbers


@lru_cache(maxsize=8)
def _odd_numbers(n: int, device: torch.device) -> Tensor:
    return torch.arange(1, 2 * n + 1, 2, device=device)
