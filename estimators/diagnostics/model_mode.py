"""The network by itself: modes, weights, what is frozen, tied or without effect, whether rows are independent."""

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
    """Dropout or batch statistics in train mode."""
    faults = mode_faults(model)
    if not faults:
        measured = f"{sum(1 for _ in model.modules())} modules, no dropout and no batch statistics in train mode"
        return Finding("modes", "ok", measured, values={"in_train_mode": 0})
    listed = "; ".join(fault.received for fault in faults[:3]) + ("; ..." if len(faults) > 3 else "")
    return Finding(
        "modes",
        "error",
        listed,
        "outputs are random, or depend on the other rows of a batch: fit refuses. What follows is of a copy in eval "
        "mode.",
        "model.eval() before fit",
        {"in_train_mode": len(faults)},
    )


def weight_finding(model: nn.Module) -> Finding:
    """Non-finite weights, several dtypes or devices."""
    faults = weight_faults(model)
    if faults:
        received = "; ".join(fault.received for fault in faults)
        return Finding("weights", "error", received, "nothing can be computed from these.", faults[0].remedy)
    first = next(p for p in model.parameters() if p.is_floating_point())
    values = {"dtype": str(first.dtype).removeprefix("torch."), "device": str(first.device)}
    measured = f"finite, {values['dtype']} on {values['device']}"
    if first.dtype in _HALVES:
        meaning = "products with A keep two or three digits."
        return Finding("weights", "warning", measured, meaning, "model.float() and inputs likewise", values)
    return Finding("weights", "ok", measured, values=values)


def parameter_finding(model: nn.Module, chosen: int) -> Finding:
    """How many parameters there are, are frozen, are chosen; which are tied."""
    total = sum(p.numel() for p in model.parameters())
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    tied = _tied(model)
    values = {"parameters": total, "frozen": frozen, "chosen": chosen, "tied": tied}
    measured = f"{chosen:,} of {total:,} in the posterior, {frozen:,} frozen"
    if not tied:
        level: Level = "note" if frozen else "ok"
        meaning = "frozen weights (requires_grad=False) are outside every subset." if frozen else ""
        return Finding("parameters", level, measured, meaning, values=values)
    names = "; ".join(" = ".join(group) for group in tied)
    meaning = f"tied: {names}. They count once, and a tied last layer has no closed form."
    return Finding("parameters", "note", measured, meaning, 'subset_of_weights="all"', values)


def _tied(model: nn.Module) -> list[list[str]]:
    """Names that share one parameter."""
    by_tensor: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_tensor.setdefault(id(parameter), []).append(name)
    return [names for names in by_tensor.values() if len(names) > 1]


def forward_findings(subject: DiagnosticContext) -> Iterator[Finding]:
    """Two forwards of one batch, a part of it by itself, and which parameters move the outputs at all."""
    network = subject.objective.network
    x = next(iter(subject.objective.batches)).x
    f = network.outputs(x)
    again = _distance(f, network.outputs(x))
    half = max(1, n_rows(x) // 2)
    alone = _distance(f[:half], network.outputs(select_rows(x, slice(0, half))))
    yield _repeatable(again)
    if not again:
        yield _independent(alone, f.dtype)
    yield _unused(subject)


def _distance(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest size."""
    return float((a - b).abs().max() / a.abs().max().clamp_min(torch.finfo(a.dtype).tiny))


def _repeatable(difference: float) -> Finding:
    measured = f"two forwards of one batch differ by {difference:.2g} of the largest output"
    if not difference:
        return Finding("determinism", "ok", measured, values={"difference": difference})
    meaning = "the forward draws random numbers (functional dropout), or keeps a state: fit refuses."
    remedy = "F.dropout(..., training=self.training), and no random numbers in forward"
    level: Level = "error" if difference > 1e-4 else "warning"
    return Finding("determinism", level, measured, meaning, remedy, {"difference": difference})


def _independent(difference: float, dtype: torch.dtype) -> Finding:
    measured = f"half a batch by itself differs by {difference:.2g} of the largest output"
    values = {"difference": difference}
    if difference < 1e3 * torch.finfo(dtype).eps:
        return Finding("independence of rows", "ok", measured, values=values)
    meaning = "a row's output depends on the other rows, and with it its variance."
    remedy = "frozen statistics (eval mode), no attention or normalisation across the batch"
    return Finding("independence of rows", "error", measured, meaning, remedy, values)


def _unused(subject: DiagnosticContext) -> Finding:
    """Parameters of the subset that no output of the training rows depends on, seen through random cotangents."""
    network: Network = subject.objective.network
    generator = torch.Generator().manual_seed(0)
    slopes = torch.zeros_like(network.theta)
    still: list[str] = []
    for batch in subject.objective.batches:
        slopes += network.outputs_and_vjp(
            batch.x, lambda f: torch.randn(f.shape, generator=generator, dtype=torch.float64).to(f)[None]
        )[1][0]
        still = [name for name, slope in network.subset.unflatten(slopes).items() if not bool(slope.any())]
        if not still:
            break
    if not still:
        return Finding("unused parameters", "ok", "every parameter moves the outputs", values={"unused": []})
    size = network.subset.n_entries(still)
    listed = ", ".join(still[:5]) + (", ..." if len(still) > 5 else "")
    return Finding(
        "unused parameters",
        "note",
        f"{size:,} in {len(still)} tensors move no output of a training row: {listed}",
        "their posterior is their prior; they cost memory and change no variance.",
        "freeze them (requires_grad_(False)), or leave them out by subset_of_weights",
        {"unused": still},
    )
