"""Checks of targets and likelihood against the predictions of the network."""

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

_LEAST_GAIN = 0.02
"""The relative gain of the NLL over a constant below which a network does not look trained."""
_SATURATED = 1e-3
"""The training NLL per label, in nats, below which p(1 − p) vanishes."""
_RARE = 0.01
"""A class is rare below this fraction of the most frequent one."""
_NOISE_RATIO = 1.5
"""The ratio of σ and RMSE, either way, up to which they count as equal."""


@dataclass(frozen=True)
class _Scores:
    """The outputs f (n, C) and targets y (n,) or (n, C) of a set of rows, with their scores."""

    likelihood: Likelihood
    f: Tensor
    y: Tensor

    @classmethod
    def of(cls, context: DiagnosticContext, batches: TrainingData) -> _Scores:
        pairs = []
        for batch in batches:
            f = check_batch(batch, context.objective.network, context.likelihood)
            pairs.append(_paired(context.likelihood, f, batch.y))
        outputs, targets = zip(*pairs, strict=True)
        return cls(context.likelihood, torch.cat(outputs).double(), torch.cat(targets))

    @property
    def classes(self) -> bool:
        return self.likelihood.kind == "classification"

    @property
    def accuracy(self) -> float:
        hits = self.f.argmax(-1) == self.labels if self.classes else (self.f > 0) == (self.y > 0.5)
        return float(hits.double().mean())

    @property
    def labels(self) -> Tensor:
        """The class indices (n,); for soft targets the most probable class."""
        return self.y.argmax(-1) if self.y.is_floating_point() else self.y.long()

    @property
    def counts(self) -> Tensor:
        """The number of labels per class, (C,); for soft targets the sum of probabilities."""
        if self.y.is_floating_point():
            return self.y.double().sum(0)
        return torch.bincount(self.y.long(), minlength=self.f.shape[-1])

    @property
    def rmse(self) -> Tensor:
        """The RMSE per output, (C,)."""
        return (self.f - self.y).square().mean(0).sqrt()

    @property
    def nll(self) -> float:
        """The mean NLL per label, in nats."""
        if self.classes:
            return float(self.likelihood.nll(self.f, self.y).mean())
        return float(self.likelihood.nll(self.f, self.y).mean()) / self.f.shape[-1]

    def nll_of_constant(self, train: _Scores) -> float:
        """Return the NLL of the constant prediction that is best for the training targets."""
        if self.classes:
            counts = train.counts.double() + 1e-9
            constant = (counts / counts.sum()).log()
        elif isinstance(self.likelihood, Gaussian):
            constant = train.y.double().mean(0)
        else:
            constant = train.y.double().mean(0).clamp(1e-9, 1 - 1e-9).logit()
        return _Scores(self.likelihood, constant.expand_as(self.f), self.y).nll


def _paired(likelihood: Likelihood, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs and targets by row, or by labelled position if rows have several."""
    if likelihood.kind != "classification":
        return f.flatten(1), y.flatten(1)
    sites = likelihood.given(y)
    if not isinstance(sites, Sites):
        return f, y
    return sites.by_site(f.flatten(1))[sites.kept], sites.labels[sites.kept]


def target_findings(context: DiagnosticContext) -> Iterator[Finding]:
    """Check the class balance, the noise against the residuals, and the loss on every set."""
    sets = {"train": context.objective.batches, **context.splits}
    scores = {name: _Scores.of(context, batches) for name, batches in sets.items()}
    train = scores["train"]
    yield _training(train)
    if train.classes:
        yield _balance(train)
    if isinstance(context.likelihood, Gaussian):
        yield _noise(context.likelihood, scores)
    else:
        yield _accuracy(scores)
    for name, held_out in scores.items():
        if name != "train":
            yield _held_out(name, held_out, train)


def _training(train: _Scores) -> Finding:
    nll, constant = train.nll, train.nll_of_constant(train)
    values = {"nll": nll, "nll_of_constant": constant}
    measured = f"training NLL {nll:.4g} per label; {constant:.4g} for the best constant"
    if nll > constant - _LEAST_GAIN * abs(constant):
        meaning = "the network predicts the training targets no better than a constant; it does not look trained."
        remedy = "check that the weights are loaded, the order of classes, and the scale of inputs and targets"
        return Finding("training loss", "warning", measured, meaning, remedy, values)
    if train.likelihood.kind != "regression" and nll < _SATURATED:
        meaning = (
            "every training label is predicted with certainty, so that p(1 − p) and the GGN vanish: the variance is "
            "nearly that of the prior."
        )
        remedy = "choose prior_precision on validation data; use more regularisation, or stop earlier"
        return Finding("training loss", "note", measured, meaning, remedy, values)
    return Finding("training loss", "ok", measured, values=values)


def _balance(train: _Scores) -> Finding:
    counts = train.counts
    least, most, absent = int(counts.min()), int(counts.max()), int((counts == 0).sum())
    values = {"least": least, "most": most, "absent": absent, "classes": len(counts)}
    measured = f"{len(counts)} classes with {least:,} to {most:,} labels each"
    if absent:
        meaning = (
            f"{absent} of them have no labels: their logits are extrapolated, and their variance is that of the prior."
        )
        remedy = "use a network with one output per class in the data"
        return Finding("class balance", "warning", measured, meaning, remedy, values)
    if least < _RARE * most:
        meaning = "mean scores contain little information about rare classes."
        return Finding("class balance", "note", measured, meaning, "compare scores per class", values)
    return Finding("class balance", "ok", measured, values=values)


def _accuracy(scores: dict[str, _Scores]) -> Finding:
    found = {name: part.accuracy for name, part in scores.items()}
    majority = _majority(scores["train"])
    listed = ", ".join(f"{name} {value:.1%}" for name, value in found.items())
    values = {**found, "majority": majority}
    measured = f"{listed}; the most frequent label {majority:.1%}"
    if found["train"] < majority:
        meaning = "lower than for always predicting the most frequent label."
        return Finding("accuracy", "warning", measured, meaning, "check the order of classes and outputs", values)
    return Finding("accuracy", "ok", measured, values=values)


def _majority(train: _Scores) -> float:
    if train.classes:
        return float(train.counts.max()) / len(train.y)
    ones = train.y.double().mean(0)
    return float(torch.maximum(ones, 1 - ones).mean())


def _noise(likelihood: Gaussian, scores: dict[str, _Scores]) -> Finding:
    judged_set = "validation" if "validation" in scores else "train"
    rmse = {name: part.rmse for name, part in scores.items()}
    sigma = torch.as_tensor(likelihood.sigma_noise).double().to(rmse[judged_set].device).expand_as(rmse[judged_set])
    ratios = sigma / rmse[judged_set].clamp_min(torch.finfo(torch.float64).tiny)
    worst = max(float(ratios.max()), 1 / float(ratios.min()))
    listed = ", ".join(f"{name} {_numbers(value)}" for name, value in rmse.items())
    values = {"sigma_noise": sigma.tolist(), **{f"rmse_{name}": value.tolist() for name, value in rmse.items()}}
    measured = f"σ = {_numbers(sigma.unique())}; RMSE {listed}"
    if worst <= _NOISE_RATIO:
        return Finding("noise", "ok", measured, values=values)
    error = "small" if float(ratios.max()) >= worst else "large"
    meaning = (
        f"σ and the residuals on {judged_set} differ by a factor of {worst:.3g}: the weight of the data relative to "
        f"the prior is {worst**2:.3g} times too {error}, and total_variance is wrong by the same factor."
    )
    remedy = f"Gaussian(sigma_noise={_numbers(rmse[judged_set])}), and train the network with it"
    return Finding("noise", "warning", measured, meaning, remedy, values)


def _numbers(values: Tensor) -> str:
    listed = ", ".join(f"{float(value):.3g}" for value in values[:3])
    return f"[{listed}{', ...' if len(values) > 3 else ''}]" if len(values) > 1 else listed


def _held_out(name: str, held_out: _Scores, train: _Scores) -> Finding:
    nll, constant = held_out.nll, held_out.nll_of_constant(train)
    values = {"nll": nll, "nll_of_constant": constant}
    measured = f"{name} NLL {nll:.4g} per label; {constant:.4g} for the best constant of the training rows"
    if nll <= constant:
        return Finding(f"{name} loss", "ok", measured, values=values)
    meaning = "worse than a constant: the network is overconfident, or the rows have another distribution."
    remedy = "use early stopping, more regularisation, or a softmax temperature or σ tuned on validation rows"
    return Finding(f"{name} loss", "warning", measured, meaning, remedy, values)
