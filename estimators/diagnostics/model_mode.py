"""Checks of the network: modes, weights, frozen, tied and unused parameters, and independence of rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from estimators.diagnostics.context import DiagnosticContext
from estimators.diagnostics.findings import Finding, Level
from estimators.models.checks import mode_faults, weight_faults
from estimators.models.network import Network
from estimators.numerics.pytrees import n_rows, select_rows

__all__ = ["forward_findings", "mode_finding", "parameter_finding", "weight_finding"]

_HALVES = (torch.float16, torch.bfloat16)


def mode_finding(model: nn.Module) -> Finding:
    """Find dropout or batch statistics in train mode."""
    faults = mode_faults(model)
    if not faults:
        measured = f"{sum(1 for _ in model.modules())} modules, no dropout and no batch statistics in train mode"
        return Finding("modes", "ok", measured, values={"in_train_mode": 0})
    listed = "; ".join(fault.received for fault in faults[:3]) + ("; ..." if len(faults) > 3 else "")
    return Finding(
        "modes",
        "error",
        listed,
        "outputs are random, or depend on the other rows of a batch: fit raises. Other checks use a copy in eval mode.",
        "model.eval() before fit",
        {"in_train_mode": len(faults)},
    )


def weight_finding(model: nn.Module) -> Finding:
    """Find weights that are not finite, or have several dtypes or devices."""
    faults = weight_faults(model)
    if faults:
        received = "; ".join(fault.received for fault in faults)
        return Finding("weights", "error", received, "no result can be computed with these weights.", faults[0].remedy)
    first = next(p for p in model.parameters() if p.is_floating_point())
    values = {"dtype": str(first.dtype).removeprefix("torch."), "device": str(first.device)}
    measured = f"finite, {values['dtype']} on {values['device']}"
    if first.dtype in _HALVES:
        meaning = "products with A have two or three correct digits."
        return Finding("weights", "warning", measured, meaning, "convert model and inputs to float32", values)
    return Finding("weights", "ok", measured, values=values)


def parameter_finding(model: nn.Module, chosen: int) -> Finding:
    """Count all, frozen and chosen parameters, and find tied ones."""
    total = sum(p.numel() for p in model.parameters())
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    tied = _tied(model)
    values = {"parameters": total, "frozen": frozen, "chosen": chosen, "tied": tied}
    measured = f"{chosen:,} of {total:,} in the posterior, {frozen:,} frozen"
    if not tied:
        level: Level = "note" if frozen else "ok"
        meaning = "frozen weights (requires_grad=False) are in no subset." if frozen else ""
        return Finding("parameters", level, measured, meaning, values=values)
    names = "; ".join(" = ".join(group) for group in tied)
    meaning = f"tied: {names}. They count once; a tied last layer has no closed form."
    return Finding("parameters", "note", measured, meaning, 'subset_of_weights="all"', values)


def _tied(model: nn.Module) -> list[list[str]]:
    """Return groups of names that share one parameter."""
    by_tensor: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_tensor.setdefault(id(parameter), []).append(name)
    return [names for names in by_tensor.values() if len(names) > 1]


def forward_findings(context: DiagnosticContext) -> Iterator[Finding]:
    """Check that the forward pass is deterministic and row by row, and find parameters without effect."""
    network = context.objective.network
    x = next(iter(context.objective.batches)).x
    f = network.outputs(x)
    again = _distance(f, network.outputs(x))
    half = max(1, n_rows(x) // 2)
    alone = _distance(f[:half], network.outputs(select_rows(x, slice(0, half))))
    yield _repeatable(again)
    if not again:
        yield _independent(alone, f.dtype)
    yield _unused(context)


def _distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference relative to the largest entry."""
    return float((a - b).abs().max() / a.abs().max().clamp_min(torch.finfo(a.dtype).tiny))


def _repeatable(difference: float) -> Finding:
    measured = f"two forward passes of one batch differ by {difference:.2g} of the largest output"
    if not difference:
        return Finding("determinism", "ok", measured, values={"difference": difference})
    meaning = "the forward pass draws random numbers (functional dropout), or has a state: fit raises."
    remedy = "F.dropout(..., training=self.training), and no random numbers in forward"
    level: Level = "error" if difference > 1e-4 else "warning"
    return Finding("determinism", level, measured, meaning, remedy, {"difference": difference})


def _independent(difference: float, dtype: torch.dtype) -> Finding:
    measured = f"half a batch alone differs by {difference:.2g} of the largest output"
    values = {"difference": difference}
    if difference < 1e3 * torch.finfo(dtype).eps:
        return Finding("independence of rows", "ok", measured, values=values)
    meaning = "the output and the variance of a row depend on the other rows."
    remedy = "use frozen statistics (eval mode), and no attention or normalisation across the batch"
    return Finding("independence of rows", "error", measured, meaning, remedy, values)


def _unused(context: DiagnosticContext) -> Finding:
    """Find parameters of the subset without effect on the outputs of the training rows, by random cotangents."""
    network: Network = context.objective.network
    generator = torch.Generator().manual_seed(0)
    gradients = torch.zeros_like(network.theta)
    unused: list[str] = []
    for batch in context.objective.batches:
        gradients += network.outputs_and_vjp(
            batch.x, lambda f: torch.randn(f.shape, generator=generator, dtype=torch.float64).to(f)[None]
        )[1][0]
        unused = [name for name, gradient in network.subset.unflatten(gradients).items() if not bool(gradient.any())]
        if not unused:
            break
    if not unused:
        return Finding("unused parameters", "ok", "every parameter has an effect on the outputs", values={"unused": []})
    size = network.subset.n_entries(unused)
    listed = ", ".join(unused[:5]) + (", ..." if len(unused) > 5 else "")
    return Finding(
        "unused parameters",
        "note",
        f"{size:,} in {len(unused)} tensors have no effect on the outputs of the training rows: {listed}",
        "their posterior equals their prior; they need memory and change no variance.",
        "freeze them (requires_grad_(False)), or exclude them by subset_of_weights",
        {"unused": unused},
    )
