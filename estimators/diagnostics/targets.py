"""Labels and likelihood against what the network predicts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from estimators.data.checks import check_batch
from estimators.data.training_data import TrainingData
from estimators.diagnostics.context import DiagnosticContext
from estimators.diagnostics.findings import Finding
from estimators.likelihoods import Gaussian, Likelihood
from estimators.likelihoods.categorical import Sites

__all__ = ["target_findings"]

_UNTRAINED, _SATURATED = 0.02, 1e-3
_RARE = 0.01


@dataclass(frozen=True)
class _Scores:
    """Of one set of rows: outputs f and targets y that belong together, (n, C) and (n,) or (n, C)."""

    likelihood: Likelihood
    f: Tensor
    y: Tensor

    @classmethod
    def of(cls, subject: DiagnosticContext, batches: TrainingData) -> _Scores:
        pairs = []
        for batch in batches:
            f = check_batch(batch, subject.objective.network, subject.likelihood)
            pairs.append(_paired(subject.likelihood, f, batch.y))
        outputs, targets = zip(*pairs, strict=True)
        return cls(subject.likelihood, torch.cat(outputs).double(), torch.cat(targets))

    @property
    def classes(self) -> bool:
        return self.likelihood.kind == "classification"

    @property
    def accuracy(self) -> float:
        hits = self.f.argmax(-1) == self.labels if self.classes else (self.f > 0) == (self.y > 0.5)
        return float(hits.double().mean())

    @property
    def labels(self) -> Tensor:
        """Class indices (n,): of soft targets the most probable."""
        return self.y.argmax(-1) if self.y.is_floating_point() else self.y.long()

    @property
    def counts(self) -> Tensor:
        """Labels by class, (C,): of soft targets the sum of their probabilities."""
        if self.y.is_floating_point():
            return self.y.double().sum(0)
        return torch.bincount(self.y.long(), minlength=self.f.shape[-1])

    @property
    def rmse(self) -> Tensor:
        """By output, (C,)."""
        return (self.f - self.y).square().mean(0).sqrt()

    @property
    def nll(self) -> float:
        """A label, in nats."""
        if self.classes:
            return float(self.likelihood.nll(self.f, self.y).mean())
        return float(self.likelihood.nll(self.f, self.y).mean()) / self.f.shape[-1]

    def nll_of_constant(self, train: _Scores) -> float:
        """Of the best constant prediction for the training targets."""
        if self.classes:
            counts = train.counts.double() + 1e-9
            constant = (counts / counts.sum()).log()
        elif isinstance(self.likelihood, Gaussian):
            constant = train.y.double().mean(0)
        else:
            constant = train.y.double().mean(0).clamp(1e-9, 1 - 1e-9).logit()
        return _Scores(self.likelihood, constant.expand_as(self.f), self.y).nll


def _paired(likelihood: Likelihood, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of outputs and targets; the kept places of rows that have several."""
    if likelihood.kind != "classification":
        return f.flatten(1), y.flatten(1)
    sites = likelihood.given(y)
    if not isinstance(sites, Sites):
        return f, y
    return sites.by_site(f.flatten(1))[sites.kept], sites.labels[sites.kept]


def target_findings(subject: DiagnosticContext) -> Iterator[Finding]:
    """Balance of classes, noise against residuals, and whether the loss looks trained, on every set."""
    sets = {"train": subject.objective.batches, **subject.splits}
    scores = {name: _Scores.of(subject, batches) for name, batches in sets.items()}
    train = scores["train"]
    yield _training(train)
    if train.classes:
        yield _balance(train)
    if isinstance(subject.likelihood, Gaussian):
        yield _noise(subject.likelihood, scores)
    else:
        yield _accuracy(scores)
    for name, held_out in scores.items():
        if name != "train":
            yield _held_out(name, held_out, train)


def _training(train: _Scores) -> Finding:
    nll, constant = train.nll, train.nll_of_constant(train)
    values = {"nll": nll, "nll_of_constant": constant}
    measured = f"training NLL {nll:.4g} a label; {constant:.4g} by the best constant"
    if nll > constant - _UNTRAINED * abs(constant):
        meaning = "the network explains nothing of its training targets: it does not look trained."
        remedy = "check weights and their loading, the order of classes, and the scale of inputs and targets"
        return Finding("training loss", "warning", measured, meaning, remedy, values)
    if train.likelihood.kind != "regression" and nll < _SATURATED:
        meaning = (
            "every training label is certain, p(1 − p) vanishes and the GGN with it: the variance is nearly that of "
            "the prior."
        )
        remedy = "prior_precision by validation; more regularisation, or stopping earlier"
        return Finding("training loss", "note", measured, meaning, remedy, values)
    return Finding("training loss", "ok", measured, values=values)


def _balance(train: _Scores) -> Finding:
    counts = train.counts
    least, most, absent = int(counts.min()), int(counts.max()), int((counts == 0).sum())
    values = {"least": least, "most": most, "absent": absent, "classes": len(counts)}
    measured = f"{len(counts)} classes with {least:,} to {most:,} labels each"
    if absent:
        meaning = f"{absent} of them have none: their logits are extrapolation, and their variance is the prior's."
        remedy = "a network with as many outputs as there are classes"
        return Finding("class balance", "warning", measured, meaning, remedy, values)
    if least < _RARE * most:
        meaning = "mean scores say little of the rare ones."
        return Finding("class balance", "note", measured, meaning, "look at scores by class", values)
    return Finding("class balance", "ok", measured, values=values)


def _accuracy(scores: dict[str, _Scores]) -> Finding:
    found = {name: part.accuracy for name, part in scores.items()}
    majority = _majority(scores["train"])
    listed = ", ".join(f"{name} {value:.1%}" for name, value in found.items())
    values = {**found, "majority": majority}
    measured = f"{listed}; the commonest label {majority:.1%}"
    if found["train"] < majority:
        meaning = "less than always saying the commonest label."
        return Finding("accuracy", "warning", measured, meaning, "check the order of classes and outputs", values)
    return Finding("accuracy", "ok", measured, values=values)


def _majority(train: _Scores) -> float:
    if train.classes:
        return float(train.counts.max()) / len(train.y)
    ones = train.y.double().mean(0)
    return float(torch.maximum(ones, 1 - ones).mean())


def _noise(likelihood: Gaussian, scores: dict[str, _Scores]) -> Finding:
    judged = "validation" if "validation" in scores else "train"
    rmse = {name: part.rmse for name, part in scores.items()}
    sigma = torch.as_tensor(likelihood.sigma_noise).double().to(rmse[judged].device).expand_as(rmse[judged])
    ratios = sigma / rmse[judged].clamp_min(torch.finfo(torch.float64).tiny)
    worst = max(float(ratios.max()), 1 / float(ratios.min()))
    listed = ", ".join(f"{name} {_numbers(value)}" for name, value in rmse.items())
    values = {"sigma_noise": sigma.tolist(), **{f"rmse_{name}": value.tolist() for name, value in rmse.items()}}
    measured = f"σ = {_numbers(sigma.unique())}; RMSE {listed}"
    if worst <= 1.5:
        return Finding("noise", "ok", measured, values=values)
    meaning = (
        f"σ is {worst:.3g} times off the residuals on {judged}: the data count {worst**2:.3g} times too "
        + ("little" if float(ratios.max()) >= worst else "much")
        + " against the prior, and total_variance is off by as much."
    )
    remedy = f"Gaussian(sigma_noise={_numbers(rmse[judged])}), and the network trained with it"
    return Finding("noise", "warning", measured, meaning, remedy, values)


def _numbers(values: Tensor) -> str:
    some = ", ".join(f"{float(value):.3g}" for value in values[:3])
    return f"[{some}{', ...' if len(values) > 3 else ''}]" if len(values) > 1 else some


def _held_out(name: str, held_out: _Scores, train: _Scores) -> Finding:
    nll, constant = held_out.nll, held_out.nll_of_constant(train)
    values = {"nll": nll, "nll_of_constant": constant}
    measured = f"{name} NLL {nll:.4g} a label; {constant:.4g} by the best constant of the training rows"
    if nll <= constant:
        return Finding(f"{name} loss", "ok", measured, values=values)
    meaning = "worse than no network at all: overconfident, or of another distribution than the training rows."
    remedy = "early stopping, more regularisation, a softmax temperature or σ tuned on validation rows"
    return Finding(f"{name} loss", "warning", measured, meaning, remedy, values)
