"""The prior precision that corresponds to a weight decay (docs/math.md, section 1)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from estimators.diagnostics.context import DiagnosticContext
from estimators.diagnostics.findings import Finding
from estimators.errors import UnsupportedError
from estimators.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from estimators.likelihoods.categorical import Sites

__all__ = ["decay_finding", "prior_precision_of"]

_NEAR, _FAR = 1.05, 2.0
"""Ratios of prior precisions up to which the finding is "ok", and above which it is "warning"."""


def prior_precision_of(
    weight_decay: float, likelihood: Likelihood, *, n_data: int, n_outputs: int, n_labels: int | None = None
) -> float:
    """Return the prior precision δ of coupled L2 weight decay wd with the usual mean loss of a likelihood.

        Categorical, mean cross-entropy      δ = N·wd, or T·wd for T labels if rows have several
        Gaussian, mean squared error         δ = N·C·wd / 2σ²
        Bernoulli, mean cross-entropy        δ = N·C·wd

    Args:
        weight_decay: wd, as torch.optim.SGD and torch.optim.Adam take it.
        likelihood: the likelihood, which determines the loss.
        n_data: the number N of training rows.
        n_outputs: the number C of outputs.
        n_labels: the number T of labels if rows have several, else None.

    Returns:
        δ in 1/weight².

    Raises:
        UnsupportedError: for another likelihood, and for a σ that differs between outputs.

    Example:
        >>> prior_precision_of(1e-4, Categorical(), n_data=50_000, n_outputs=10)
        5.0
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
        remedy="compute δ from the scale of the training loss: L is a sum of −log p over rows.",
    )


def decay_finding(context: DiagnosticContext) -> Iterator[Finding]:
    """Compare the given δ with the one that corresponds to the weight decay."""
    if context.weight_decay is None:
        return
    optimizer = context.weight_decay if isinstance(context.weight_decay, torch.optim.Optimizer) else None
    if optimizer is not None and _decoupled(optimizer):
        yield _decoupled_finding(optimizer)
        return
    try:
        factor = prior_precision_of(
            1.0,
            context.likelihood,
            n_data=context.n_data,
            n_outputs=context.n_outputs,
            n_labels=_n_labels(context),
        )
    except UnsupportedError as error:
        yield Finding("weight decay", "note", f"not compared: {error.received}", error.expected, error.remedy)
        return
    yield _compare(context, _decays(context), factor)


def _decoupled(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the weight decay is decoupled, as in AdamW."""
    by_name = type(optimizer).__name__.lower().endswith("adamw")
    groups = [group for group in optimizer.param_groups if group.get("weight_decay", 0)]
    return any(group.get("decoupled_weight_decay", by_name) for group in groups)


def _decoupled_finding(optimizer: torch.optim.Optimizer) -> Finding:
    decays = sorted({float(group.get("weight_decay", 0)) for group in optimizer.param_groups})
    return Finding(
        "weight decay",
        "note",
        f"{type(optimizer).__name__}, weight decay {', '.join(f'{wd:g}' for wd in decays)}, decoupled from the loss",
        "decoupled weight decay does not minimise L of any prior: no prior precision corresponds to it.",
        "choose prior_precision on validation data, or by the marginal likelihood",
        {"weight_decay": decays, "decoupled": True},
    )


def _n_labels(context: DiagnosticContext) -> int | None:
    """Return the number T of labels if rows have several or none, else None."""
    if context.likelihood.kind != "classification":
        return None
    total, one_per_row = 0, True
    for batch in context.objective.batches:
        sites = context.likelihood.given(batch.y)
        several = isinstance(sites, Sites)
        total += int(sites.kept.sum()) if isinstance(sites, Sites) else len(batch)
        one_per_row = one_per_row and not several
    return None if one_per_row else total


def _decays(context: DiagnosticContext) -> dict[str, float]:
    """Return the weight decay of each parameter of the subset that the optimizer has trained."""
    names = list(context.objective.network.subset.shapes)
    if not isinstance(context.weight_decay, torch.optim.Optimizer):
        return dict.fromkeys(names, float(context.weight_decay or 0.0))
    found = {id(p): float(group.get("weight_decay", 0)) for group in context.weight_decay.param_groups
             for p in group["params"]}  # fmt: skip
    parameters: dict[str, nn.Parameter] = dict(context.model.named_parameters())
    return {name: found[id(parameters[name])] for name in names if id(parameters[name]) in found}


def _compare(context: DiagnosticContext, decays: dict[str, float], factor: float) -> Finding:
    if not any(decays.values()):
        meaning = "the network was trained without a prior: choose the prior precision after training."
        remedy = "choose prior_precision on validation data, or by the marginal likelihood"
        return Finding("weight decay", "note", "no weight decay", meaning, remedy, {"weight_decay": 0.0})
    slices, passed = context.objective.network.subset.slices, context.objective.prior.precision
    expected = {name: factor * wd for name, wd in decays.items()}
    given = {name: _typical(passed[slices[name]]) for name in decays}
    ratio = max(_ratio(given[name], expected[name]) for name in decays)
    values = {"factor": factor, "prior_precision": expected, "passed": given, "ratio": ratio}
    measured = (
        f"weight decay {_range(decays)} with a mean loss is δ = {_product(factor, decays, expected)}; "
        f"prior_precision is {_range(given)}"
    )
    if ratio <= _NEAR:
        return Finding("weight decay", "ok", measured, values=values)
    far = f"by a factor of {ratio:.3g}" if ratio < float("inf") else "and one of them is 0"
    meaning = f"the prior precision differs from that of the training {far}."
    remedy = f"prior_precision={_argument(expected)}, unless it was chosen on validation data"
    return Finding("weight decay", "note" if ratio <= _FAR else "warning", measured, meaning, remedy, values)


def _typical(delta: Tensor) -> float:
    """Return the δ of a parameter, the mean if its weights have several."""
    return float(delta[0] if bool((delta == delta[0]).all()) else delta.mean())


def _ratio(a: float, b: float) -> float:
    """Return the ratio of the larger to the smaller number, 1 for equal ones, infinite if one of them is 0."""
    low, high = sorted((a, b))
    if low == high:
        return 1.0
    return high / low if low > 0 else float("inf")


def _range(values: dict[str, float]) -> str:
    low, high = min(values.values()), max(values.values())
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def _product(factor: float, decays: dict[str, float], expected: dict[str, float]) -> str:
    """Return the text of δ as the product of a factor and the weight decay; the range alone if there are several."""
    if len(set(decays.values())) > 1:
        return f"{_range(expected)}, {factor:.4g} times as large"
    return f"{factor:.4g} · {_range(decays)} = {_range(expected)}"


def _argument(values: dict[str, float]) -> str:
    """Return the text of an argument: one number, or a mapping by name."""
    if len(set(values.values())) == 1:
        return f"{next(iter(values.values())):.4g}"
    return "{" + ", ".join(f'"{name}": {value:.4g}' for name, value in list(values.items())[:4]) + ", ...}"
