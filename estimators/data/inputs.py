"""Inputs of a batch or a query: what users may pass, and the form in which they are passed on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from estimators.errors import DataError
from estimators.models.outputs import without_inference
from estimators.numerics.pytrees import PyTree, Shared

__all__ = ["as_inputs"]

_CONSTANTS = (bool, int, float, complex, str, bytes, np.generic, Enum, torch.dtype, torch.device, torch.Size)


def as_inputs(x: PyTree) -> PyTree:
    """Return the inputs of a batch or a query in internal form: a mapping or dataclass becomes a dict.

    Thus transformers' BatchEncoding and ModelOutput, OrderedDict and UserDict become dicts, whose entries are arguments
    of the forward by name.

    Raises:
        DataError: inputs whose rows cannot be taken (packed, nested or sparse tensors, arrays and other objects).
    """
    if isinstance(x, Mapping):
        x = dict(x.items())
    elif is_dataclass(x) and not isinstance(x, (type, Shared)):
        x = {field.name: getattr(x, field.name) for field in fields(x)}
    for path, leaf in pytree.tree_flatten_with_path(x, is_leaf=lambda node: isinstance(node, PackedSequence))[0]:
        _check_leaf(leaf, pytree.keystr(path))
    return pytree.tree_map_only(Tensor, without_inference, x)


def _check_leaf(leaf: object, path: str) -> None:
    """Raise DataError for a leaf whose rows cannot be selected."""
    leaf = leaf.value if isinstance(leaf, Shared) else leaf
    if leaf is None or callable(leaf) or isinstance(leaf, _CONSTANTS):
        return
    if isinstance(leaf, Tensor) and leaf.layout == torch.strided and not leaf.is_nested:
        return
    remedy = "make it a dense tensor with rows first, .to_dense() for a sparse one, or convert it inside forward."
    if isinstance(leaf, PackedSequence):
        remedy = "pass padded sequences (B, T, ...) and their lengths (B,), and call pack_padded_sequence in forward."
    elif isinstance(leaf, Tensor) and leaf.is_nested:
        remedy = "pad: torch.nested.to_padded_tensor(x, 0.0), and pass the lengths or a mask; nest it inside forward."
    elif isinstance(leaf, np.ndarray):
        remedy = "torch.from_numpy(x)."
    kind = f"a tensor of layout {leaf.layout}" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"
    kind = "a nested tensor" if isinstance(leaf, Tensor) and leaf.is_nested else kind
    raise DataError(
        "inputs made of dense tensors, numbers and strings",
        received=kind + (f" at {path}" if path else ""),
        remedy=remedy,
    )
