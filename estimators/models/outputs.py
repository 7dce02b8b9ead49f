"""The outputs of a model as one ordinary tensor."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from estimators.errors import ModelError

__all__ = ["output_tensor", "without_inference"]


def output_tensor(output: object) -> Tensor:
    """Return the outputs of a model as one tensor.

    Args:
        output: what the model returned: a tensor, or a mapping or an object with a tensor "logits".

    Returns:
        The outputs (B, ...), with at least two dimensions.

    Raises:
        ModelError: there is no tensor, it is not of a floating-point dtype, or it has fewer than two dimensions.
    """
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    tensor = output if isinstance(output, Tensor) else named
    if not isinstance(tensor, Tensor):
        raise ModelError(
            'a model that returns a tensor, or a dict or object with a tensor "logits"',
            received=f"an output of type {type(output).__name__}",
            remedy="wrap the model in a Module whose forward picks the tensor, or joins several (torch.cat).",
        )
    if not tensor.is_floating_point():
        raise ModelError(
            "real outputs of a floating-point dtype",
            received=str(tensor.dtype),
            remedy="return the real part, or real and imaginary parts side by side (torch.view_as_real).",
        )
    if tensor.ndim < 2:
        raise ModelError(
            "outputs of shape (B, C), or (B, ...) with several dimensions per row",
            received=f"shape {tuple(tensor.shape)}",
            remedy="give the output a last dimension, for instance .unsqueeze(-1), and the targets too.",
        )
    return tensor


def without_inference(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it was made in inference mode: autograd cannot save such a tensor for backward."""
    return tensor.clone() if tensor.is_inference() else tensor
