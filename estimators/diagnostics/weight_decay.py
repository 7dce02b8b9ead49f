"""Which prior precision a weight decay stands for (docs/math.md: sums, never means)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from estimators.diagnostics.context import DiagnosticContext
from estimators.diagnostics.findings import Finding
from estimators.errors import UnsupportedError
from estimators.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from estimators.likelihoods.categorical import Sites

__all__ = ["decay_finding", "prior_precision_of"]

_NEAR, _FAR = 1.05, 2.0


def prior_precision_of(
    weight_decay: float, likelihood: Likelihood, *, n_data: int, n_outputs: int, n_labels: int | None = None
) -> float:
    """δ of plain (coupled) L2 weight decay wd beside the mean loss that is usual for a likelihood.

        Categorical, mean cross-entropy      δ = N·wd, or T·wd for T labels (`n_labels`) of several a row
        Gaussian, mean squared error         δ = N·C·wd / 2σ²
        Bernoulli, mean cross-entropy        δ = N·C·wd

    Errors: UnsupportedError for other likelihoods, and for a σ that differs between outputs.
    """
    if isinstance(likelihood, Categorical):
        return (n_data if n_labels is None else n_labels) * weight_decay
    if isinstance(likelihood, Bernoulli):
        return n_data * n_outputs * weight_decay
    if isinstance(likelihood, Gaussian):
        sigma = torch.as_tensor(likelihood.sigma_noise).double().flatten()
        if bool((sigma == sigma[0]).all()):
            return n_data * n_outputs * weight_decay / (2 * float(sigma[0]) ** 2)
    raise UnsupportedError(
        "one sigma_noise, or a categorical or Bernoulli likelihood",
        received=repr(likelihood),
        remedy="δ from the scale of the loss that was trained: L is a sum of −log p over rows.",
    )


def decay_finding(subject: DiagnosticContext) -> Iterator[Finding]:
    """The δ that belongs to the weight decay, and how far the one passed is from it."""
    if subject.weight_decay is None:
        return
    optimizer = subject.weight_decay if isinstance(subject.weight_decay, torch.optim.Optimizer) else None
    if optimizer is not None and _decoupled(optimizer):
        yield _no_delta(optimizer)
        return
    try:
        factor = prior_precision_of(
            1.0,
            subject.likelihood,
            n_data=subject.n_data,
            n_outputs=subject.n_outputs,
            n_labels=_n_labels(subject),
        )
    except UnsupportedError as error:
        yield Finding("weight decay", "note", f"not compared: {error.received}", error.expected, error.remedy)
        return
    yield _compared(subject, _decays(subject), factor)


def _decoupled(optimizer: torch.optim.Optimizer) -> bool:
    """AdamW and its kind, wherever a group decays."""
    by_name = type(optimizer).__name__.lower().endswith("adamw")
    groups = [group for group in optimizer.param_groups if group.get("weight_decay", 0)]
    return any(group.get("decoupled_weight_decay", by_name) for group in groups)


def _no_delta(optimizer: torch.optim.Optimizer) -> Finding:
    decays = sorted({float(group.get("weight_decay", 0)) for group in optimizer.param_groups})
    return Finding(
        "weight decay",
        "note",
        f"{type(optimizer).__name__}, weight decay {', '.join(f'{wd:g}' for wd in decays)}, decoupled from the loss",
        "its optimum is that of no prior: there is no prior precision that belongs to it.",
        "choose prior_precision on validation data, or by the marginal likelihood",
        {"weight_decay": decays, "decoupled": True},
    )


def _n_labels(subject: DiagnosticContext) -> int | None:
    """T, where a row has several labels, or none: those that are kept."""
    if subject.likelihood.kind != "classification":
        return None
    total, one_a_row = 0, True
    for batch in subject.objective.batches:
        sites = subject.likelihood.given(batch.y)
        several = isinstance(sites, Sites)
        total += int(sites.kept.sum()) if isinstance(sites, Sites) else len(batch)
        one_a_row = one_a_row and not several
    return None if one_a_row else total


def _decays(subject: DiagnosticContext) -> dict[str, float]:
    """The weight decay of each parameter of the subset; those that no group of the optimizer has were not trained."""
    names = list(subject.objective.network.subset.shapes)
    if not isinstance(subject.weight_decay, torch.optim.Optimizer):
        return dict.fromkeys(names, float(subject.weight_decay or 0.0))
    found = {id(p): float(group.get("weight_decay", 0)) for group in subject.weight_decay.param_groups
             for p in group["params"]}  # fmt: skip
    parameters: dict[str, nn.Parameter] = dict(subject.model.named_parameters())
    return {name: found[id(parameters[name])] for name in names if id(parameters[name]) in found}


def _compared(subject: DiagnosticContext, decays: dict[str, float], factor: float) -> Finding:
    if not any(decays.values()):
        meaning = "the prior had no part in training: every prior precision is chosen afterwards."
        remedy = "choose prior_precision on validation data, or by the marginal likelihood"
        return Finding("weight decay", "note", "no weight decay", meaning, remedy, {"weight_decay": 0.0})
    places, passed = subject.objective.network.subset.slices, subject.objective.prior.precision
    belongs = {name: factor * wd for name, wd in decays.items()}
    given = {name: float(passed[places[name]][0]) for name in decays}
    ratio = max(_ratio(given[name], belongs[name]) for name in decays)
    values = {"factor": factor, "prior_precision": belongs, "passed": given, "ratio": ratio}
    measured = (
        f"weight decay {_range(decays)} beside a mean loss is δ = {_range(belongs)} (a factor of {factor:.4g}); "
        f"passed: {_range(given)}"
    )
    if ratio <= _NEAR:
        return Finding("weight decay", "ok", measured, values=values)
    far = f"by a factor of {ratio:.3g}" if ratio < float("inf") else "where one of them is 0"
    meaning = f"the prior precision differs from that of the training {far}."
    remedy = f"prior_precision={_argument(belongs)}, unless it was chosen on validation data"
    return Finding("weight decay", "note" if ratio <= _FAR else "warning", measured, meaning, remedy, values)


def _ratio(a: float, b: float) -> float:
    """How many times apart, 1 for equal numbers, infinite where one of them is 0."""
    low, high = sorted((a, b))
    if low == high:
        return 1.0
    return high / low if low > 0 else float("inf")


def _range(values: dict[str, float]) -> str:
    low, high = min(values.values()), max(values.values())
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def _argument(values: dict[str, float]) -> str:
    """As an argument: one number, or a mapping by name."""
    if len(set(values.values())) == 1:
        return f"{next(iter(values.values())):.4g}"
    return "{" + ", ".join(f'"{name}": {value:.4g}' for name, value in list(values.items())[:4]) + ", ...}"
