"""What a model returns, as one tensor."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from estimators.errors import ModelError

__all__ = ["output_tensor"]


def output_tensor(output: object) -> Tensor:
    """The outputs (B, ...) of a model: a tensor, or the "logits" of a mapping or an object."""
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    tensor = output if isinstance(output, Tensor) else named
    if not isinstance(tensor, Tensor):
        raise ModelError(
            'a model that returns a tensor, or a dict or object with a tensor "logits"',
            received=f"an output of type {type(output).__name__}",
            remedy="wrap the model in a Module whose forward picks the tensor, or joins several (torch.cat).",
        )
    if tensor.ndim < 2:
        raise ModelError(
            "outputs of shape (B, C), or (B, ...) with several dimensions a row",
            received=f"shape {tuple(tensor.shape)}",
            remedy="give the output a last dimension, for instance .unsqueeze(-1), and the targets too.",
        )
    return tensor
