"""Checks that a network has finite weights and is deterministic."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from estimators.errors import ModelError
from estimators.models.working_dtype import FLOATS
from estimators.numerics.reductions import is_finite
from estimators.runtime.module_wrappers import named_tensors

__all__ = ["check_model", "mode_faults", "weight_faults"]


def check_model(model: nn.Module) -> None:
    """Check that weights are finite and on one device, and that no module is random or uses batch statistics.

    Raises:
        ModelError: one of these does not hold.
    """
    for fault in (*weight_faults(model), *mode_faults(model)):
        raise fault


def weight_faults(model: nn.Module) -> list[ModelError]:
    """The errors for weights on several devices, in unsupported dtypes, or not finite."""
    floats = [p for p in model.parameters() if p.is_floating_point() or p.is_complex()]
    device_fault = _device_fault(model, floats)
    if device_fault is not None:
        return [device_fault]
    others = {str(p.dtype) for p in floats if p.dtype.to_real() not in FLOATS}
    if others:
        expected = f"parameters in one of {', '.join(map(str, FLOATS))}, or complex ones of such parts"
        return [ModelError(expected, received=", ".join(sorted(others)), remedy="model.to(torch.float32).")]
    return [
        ModelError("finite weights", received=f"NaN or Inf in {name!r}", remedy="train the model again.")
        for name, tensor in named_tensors(model).items()
        if not is_finite(tensor)
    ]


def _device_fault(model: nn.Module, floats: list[nn.Parameter]) -> ModelError | None:
    """The error for weights that are offloaded, have no values, or are on several devices; None if there is none."""
    without_values = [name for name, p in model.named_parameters() if p.is_meta]
    if without_values and any(hasattr(module, "_hf_hook") for module in model.modules()):
        return ModelError(
            "parameters in memory",
            received=f"{without_values[0]!r} on the meta device, as accelerate's cpu_offload and disk_offload leave it",
            remedy="accelerate.hooks.remove_hook_from_module(model, recurse=True), which brings the weights back.",
        )
    if not without_values and len({p.device for p in floats}) == 1:
        return None
    listed = ", ".join(sorted({f"{p.dtype} on {p.device}" for p in floats})) or "no parameters"
    to_device = "model.to_empty(device=device) and load_state_dict" if without_values else "model.to(device)"
    return ModelError("parameters on one device that holds their values", received=listed, remedy=f"{to_device}.")


def mode_faults(model: nn.Module) -> list[ModelError]:
    """The errors for modules in train mode whose outputs are random, or depend on the other rows."""
    found = (_mode_fault(name, module) for name, module in model.named_modules() if module.training)
    return [fault for fault in found if fault is not None]


def _mode_fault(name: str, module: nn.Module) -> ModelError | None:
    """The error for a module in train mode that is random or couples rows; None if it does not."""
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
