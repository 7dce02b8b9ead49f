"""Seeded faults: for every check of the kit an estimator that is wrong in one way, and the check that must find it."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from estimators import LinearizedLaplace
from estimators.errors import UnsupportedError
from estimators.model_checks import fingerprint
from estimators.testing import CHECKS, ConformanceError, check_estimator

EXACT, APPROXIMATE = {"exact": "ggn"}, {"prior_of": "all"}


class Good(LinearizedLaplace):
    """What the faults are seeded into."""


def variance(change):
    """A fault in `_variance` alone: change(variance, estimator, x)."""

    class Fault(Good):
        def _variance(self, x):
            return change(super()._variance(x), self, x)

    return Fault


def both(change):
    """The same in variance and covariance, so that the two agree."""

    class Fault(variance(change)):
        def _covariance(self, x):
            return self._variance(x).diag_embed()

    return Fault


def fit(change):
    """A fault in what is fitted: change(objective) -> objective."""

    class Fault(Good):
        def _fit(self, objective, *, progress_bar):
            super()._fit(change(objective), progress_bar=progress_bar)

    return Fault


def prediction(change):
    """A fault in `predict`: change(prediction) -> prediction."""

    class Fault(Good):
        def predict(self, x, **options):
            return change(super().predict(x, **options))

    return Fault


def loader(change):
    """A `fit` that mends what it should refuse: change(batches) -> batches."""

    class Fault(Good):
        def fit(self, train_loader, **options):
            return super().fit(change(train_loader), **options)

    return Fault


def samples(change):
    """A fault in `_sample`: change(samples, mean, generator) -> samples."""

    class Fault(Good):
        def _sample(self, x, n_samples, generator):
            return change(super()._sample(x, n_samples, generator), self.network_.outputs(x), generator)

    return Fault


def with_prior(objective, precision):
    return replace(objective, prior=replace(objective.prior, precision=precision))


def mean_of_losses(objective):
    """A = G/N + δ in place of G + δ is (G + Nδ)/N."""
    return with_prior(objective, objective.prior.precision * objective.batches.n_data)


class MeanLoss(fit(mean_of_losses)):
    def _variance(self, x):
        return super()._variance(x) * self.n_data_


def transposed_blocks(covariance):
    """(M, C, C) read as (C, M, C)."""
    return covariance.transpose(0, 1).reshape(covariance.shape)


class TransposedCovariance(Good):
    def _covariance(self, x):
        return transposed_blocks(super()._covariance(x))


class TransposedBoth(TransposedCovariance):
    def _variance(self, x):
        return self._covariance(x).diagonal(dim1=1, dim2=2)


class DiagonalCovariance(Good):
    def _covariance(self, x):
        return self._variance(x).diag_embed()


class TrainModeAfterFit(Good):
    def _fit(self, objective, *, progress_bar):
        super()._fit(objective, progress_bar=progress_bar)
        self.model.train()


class ChangedWeight(Good):
    def _fit(self, objective, *, progress_bar):
        super()._fit(objective, progress_bar=progress_bar)
        with torch.no_grad():
            next(self.model.parameters()).view(-1)[0] += 1e-12


class UnfreezesWhileFitting(Good):
    def fit(self, train_loader, **options):
        before = [p.requires_grad for p in self.model.parameters()]
        self.model.requires_grad_(True)
        super().fit(train_loader, **options)
        for parameter, required in zip(self.model.parameters(), before, strict=True):
            parameter.requires_grad_(required)
        return self


class HookAtQuery(Good):
    def _variance(self, x):
        self.model.register_forward_hook(lambda *_: None)
        return super()._variance(x)


class GlobalRandomNumbers(Good):
    def fit(self, train_loader, **options):
        torch.rand(1)
        return super().fit(train_loader, **options)


class Unseeded(Good):
    def _fit(self, objective, *, progress_bar):
        super()._fit(objective, progress_bar=progress_bar)
        self.factor_ = 1 + 1e-3 * torch.rand(1).item()

    def _variance(self, x):
        return super()._variance(x) * self.factor_


class Accumulating(Good):
    def _fit(self, objective, *, progress_bar):
        super()._fit(objective, progress_bar=progress_bar)
        self.fits_ = getattr(self, "fits_", 0) + 1

    def _variance(self, x):
        return super()._variance(x) / self.fits_


class OnlyFullBatches(Good):
    def _fit(self, objective, *, progress_bar):
        batches = objective.batches
        size = len(batches.stored[0])
        kept = tuple(batch for batch in batches.stored if len(batch) == size)
        super()._fit(replace(objective, batches=replace(batches, stored=kept)), progress_bar=progress_bar)


class FirstRowsOnly(Good):
    def _fit(self, objective, *, progress_bar):
        kept = objective.batches.stored[:1]
        super()._fit(replace(objective, batches=replace(objective.batches, stored=kept)), progress_bar=progress_bar)


class FrozenToo(Good):
    def _names(self, train_loader):  # noqa: ARG002
        return [name for name, _ in self.model.named_parameters()]


class OnePrior(Good):
    def _over(self, network, batches):
        objective = super()._over(network, batches)
        precision = objective.prior.precision
        return with_prior(objective, precision[:1].expand_as(precision).clone())


class OneNoise(Good):
    def __init__(self, model, likelihood, **options):
        if torch.as_tensor(getattr(likelihood, "sigma_noise", 1.0)).ndim:
            likelihood = type(likelihood)(float(likelihood.sigma_noise[0]))
        super().__init__(model, likelihood, **options)


class Unchecked(Good):
    def variance(self, x, *, of=None):  # noqa: ARG002
        return self._variance(x)


class RunsInConstructor(Good):
    def __init__(self, model, likelihood, **options):
        super().__init__(model, likelihood, **options)
        self.outputs_ = model(torch.zeros(1, 3, dtype=next(model.parameters()).dtype))


class ReturnsNothing(Good):
    def fit(self, train_loader, **options):
        super().fit(train_loader, **options)


class Squeezed(Good):
    def variance(self, x, *, of=None):
        return super().variance(x, of=of).squeeze()


class Flat(Good):
    def variance(self, x, *, of=None):
        return super().variance(x, of=of).flatten(1)


class AlwaysDouble(Good):
    def variance(self, x, *, of=None):
        return super().variance(x, of=of).double()


class PaddedQueries(Good):
    def variance(self, x, *, of=None):
        return super().variance(nn.functional.pad(x, (0, 3 - x.shape[1])), of=of)


class EmptyIsFine(Good):
    def variance(self, x, *, of=None):
        return super().variance(x, of=of) if len(x) else x.new_zeros(0, 2)


class ModelMayChange(Good):
    def variance(self, x, *, of=None):
        if hasattr(self, "fingerprint_"):
            self.fingerprint_ = fingerprint(self.model)
        return super().variance(x, of=of)


class EvalFirst(Good):
    def fit(self, train_loader, **options):
        self.model.eval()
        return super().fit(train_loader, **options)


class TensorsOnly(Good):
    def _variance(self, x):
        return super()._variance(x + 0)


class OtherMean(Good):
    def _mean(self, x):
        return super()._mean(x).roll(1, -1)


class TransposedSamples(Good):
    def sample(self, x, n_samples, *, seed=0):
        return super().sample(x, n_samples, seed=seed).transpose(0, 1)


class NoFunctional(Good):
    def _variance_of(self, x, of):
        return of(self._variance(x).T).T if x.ndim == 1 else super()._variance_of(x, of).sqrt()


class HalfSaved(Good):
    def _learned(self):
        tensors, learned = super()._learned()
        return {name: 0.5 * tensor for name, tensor in tensors.items()}, learned


def refusing(*_, **__):
    raise UnsupportedError("nothing", received="something", remedy="nothing.")


def independent_rows(drawn, mean, generator):
    """Each row's samples in an order of its own."""
    order = torch.rand(drawn.shape[:2], generator=generator).argsort(0)[..., None].expand_as(drawn)
    return drawn.gather(0, order) + 0 * mean


def half_precision(v, estimator, x):  # noqa: ARG001
    return v.bfloat16().to(v.dtype) if v.dtype == torch.float32 else v


def broadcast(batches):
    return [(x, y[:, :1].expand(len(x), 2) if y.ndim > 1 else y[:, None].expand(-1, 2)) for x, y in batches]


def without_nan(batches):
    return [(x.nan_to_num(), y.nan_to_num()) for x, y in batches]


def is_binary(estimator):
    return estimator.likelihood.kind == "binary"


def noise_of(estimator):
    return getattr(estimator.likelihood, "sigma_noise", 0.0) ** 2


FAULTS = {
    "refuses everything": (refusing, APPROXIMATE, "supports-a-model"),
    "works in the constructor": (RunsInConstructor, APPROXIMATE, "constructor-stores"),
    "asks no questions before fit": (Unchecked, APPROXIMATE, "not-fitted"),
    "fit returns None": (ReturnsNothing, APPROXIMATE, "fit-returns-self"),
    "squeezes": (Squeezed, APPROXIMATE, "shapes"),
    "flattens": (Flat, APPROXIMATE, "output-shape"),
    "always float64": (AlwaysDouble, APPROXIMATE, "dtype-device"),
    "NaN far out": (
        variance(lambda v, _, x: torch.where(x.norm(dim=-1, keepdim=True) > 9, torch.nan, v)),
        APPROXIMATE,
        "finite",
    ),
    "sums that go on": (Accumulating, APPROXIMATE, "fit-idempotent"),
    "factor of two": (both(lambda v, *_: 2 * v), EXACT, "closed-form-regression"),
    "factor of two, approximation": (both(lambda v, *_: 2 * v), APPROXIMATE, "prior-limit"),
    "classes off by one": (both(lambda v, *_: v.roll(1, -1)), EXACT, "closed-form-classification"),
    "transposed blocks in the variance": (TransposedBoth, EXACT, "closed-form-classification"),
    "Λ of another likelihood": (
        both(lambda v, estimator, _: v * (0.9 if is_binary(estimator) else 1)),
        EXACT,
        "closed-form-binary",
    ),
    "a hundredth of a percent": (both(lambda v, *_: v * 1.0001), EXACT, "closed-form-network"),
    "algebra in bfloat16": (variance(half_precision), EXACT, "closed-form-float32"),
    "one δ for all groups": (OnePrior, EXACT, "closed-form-prior-groups"),
    "one σ for all outputs": (OneNoise, EXACT, "closed-form-noise-per-output"),
    "frozen weights take part": (FrozenToo, EXACT, "closed-form-frozen"),
    "outputs taken as independent": (DiagonalCovariance, EXACT, "closed-form-covariance"),
    "negative": (both(lambda v, *_: -v), APPROXIMATE, "non-negative"),
    "constant": (both(lambda v, *_: torch.ones_like(v)), APPROXIMATE, "not-constant"),
    "forgotten prior": (
        fit(lambda objective: with_prior(objective, objective.prior.precision * 1e-3)),
        APPROXIMATE,
        "below-prior",
    ),
    "forgotten prior, exact": (
        fit(lambda objective: with_prior(objective, objective.prior.precision * 1e-3)),
        EXACT,
        "closed-form-regression",
    ),
    "precision taken for a variance": (
        fit(lambda objective: with_prior(objective, 1 / objective.prior.precision)),
        APPROXIMATE,
        "prior-monotone",
    ),
    "noise in the variance": (
        both(lambda v, estimator, _: v + noise_of(estimator)),
        APPROXIMATE,
        "noise-not-epistemic",
    ),
    "mean of losses": (MeanLoss, APPROXIMATE, "data-take-variance"),
    "mean of losses, exact": (MeanLoss, EXACT, "closed-form-regression"),
    "standard deviation": (both(lambda v, *_: v.sqrt()), APPROXIMATE, "scaling-law"),
    "a jitter on every output": (both(lambda v, *_: v + 1e-6), APPROXIMATE, "constant-output"),
    "another mean": (OtherMean, APPROXIMATE, "predict-mean"),
    "predict has a variance of its own": (
        prediction(lambda p: replace(p, epistemic_variance=p.epistemic_variance.sqrt())),
        APPROXIMATE,
        "predict-epistemic",
    ),
    "noise added as a deviation": (
        prediction(lambda p: replace(p, total_variance=p.epistemic_variance + p.aleatoric_variance.sqrt())),
        APPROXIMATE,
        "total-variance",
    ),
    "entropy in bits": (
        prediction(lambda p: p if p.entropy is None else replace(p, entropy=p.entropy / 0.6931471805599453)),
        APPROXIMATE,
        "probabilities",
    ),
    "a link without the variance": (
        prediction(lambda p: replace(p, probs=p.mean.softmax(-1) if p.mean.shape[1] == 3 else p.mean.sigmoid())),
        APPROXIMATE,
        "link",
    ),
    "transposed blocks": (TransposedCovariance, APPROXIMATE, "covariance"),
    "samples last": (TransposedSamples, APPROXIMATE, "sample-shape"),
    "samples without the mean": (samples(lambda s, mean, _: s - mean), APPROXIMATE, "sample-moments"),
    "samples of a root too many": (
        samples(lambda s, mean, _: mean + (s - mean) * 0.8),
        APPROXIMATE,
        "sample-moments",
    ),
    "samples row by row": (samples(independent_rows), EXACT, "sample-joint"),
    "samples from the global state": (
        samples(lambda s, *_: s + 1e-9 * torch.randn(s.shape)),
        APPROXIMATE,
        "sample-seed",
    ),
    "samples with a seed of their own": (
        samples(lambda s, *_: 0 * s + torch.randn(s.shape, generator=torch.Generator().manual_seed(0))),
        APPROXIMATE,
        "sample-seed-varies",
    ),
    "a functional's deviation": (NoFunctional, APPROXIMATE, "functional"),
    "over the batch": (both(lambda v, *_: v / v.mean()), APPROXIMATE, "batch-independence"),
    "the first batch only": (FirstRowsOnly, APPROXIMATE, "training-row-order"),
    "the ragged batch dropped": (OnlyFullBatches, APPROXIMATE, "loader-batch-size"),
    "tensors only": (TensorsOnly, APPROXIMATE, "dict-inputs"),
    "left in train mode": (TrainModeAfterFit, APPROXIMATE, "model-untouched-by-fit"),
    "a changed weight": (ChangedWeight, APPROXIMATE, "model-untouched-by-fit"),
    "a hook that stays": (HookAtQuery, APPROXIMATE, "model-untouched-by-queries"),
    "unfrozen, and left so by an exception": (
        UnfreezesWhileFitting,
        APPROXIMATE,
        "untouched-after-an-exception",
    ),
    "draws from the global state": (GlobalRandomNumbers, APPROXIMATE, "random-state-untouched"),
    "without a seed": (Unseeded, APPROXIMATE, "reproducible"),
    "targets broadcast": (loader(broadcast), APPROXIMATE, "rejects-target-shape"),
    "queries padded": (PaddedQueries, APPROXIMATE, "rejects-input-shape"),
    "NaN patched": (loader(without_nan), APPROXIMATE, "rejects-nan"),
    "an iterator kept": (loader(list), APPROXIMATE, "rejects-one-shot-loader"),
    "eval mode set silently": (EvalFirst, APPROXIMATE, "rejects-train-mode"),
    "nothing of nothing": (EmptyIsFine, APPROXIMATE, "rejects-empty-query"),
    "the model may change": (ModelMayChange, APPROXIMATE, "notices-a-changed-model"),
    "half of the state": (HalfSaved, APPROXIMATE, "state-round-trip"),
}


@pytest.mark.parametrize(("make", "claims", "name"), FAULTS.values(), ids=FAULTS.keys())
def test_a_seeded_fault_is_found_by_the_check_that_is_meant_for_it(make, claims, name):
    report = check_estimator(make, checks=[name], raises=False, **claims)
    assert list(report.failed) == [name]
    if not report.failed[name].startswith("raised"):
        assert all(word in report.failed[name] for word in ("Expected", "Received", "Likely fault"))


def test_every_check_has_a_fault_that_it_finds():
    assert {name for _, _, name in FAULTS.values()} == set(CHECKS)


def test_what_the_faults_are_seeded_into_has_none():
    assert check_estimator(Good, exact="ggn").failed == {}


def test_the_error_names_every_check_that_failed_and_has_the_report():
    with pytest.raises(ConformanceError, match="closed-form-network") as caught:
        check_estimator(FAULTS["factor of two"][0], exact="ggn", checks=["shapes", "closed-form-network"])
    assert list(caught.value.report.failed) == ["closed-form-network"]
    assert caught.value.report.passed == ["shapes"]
    assert "2 over all" in str(caught.value)


def test_adapted_networks_are_what_the_estimator_gets():
    def with_dropout(model):
        return nn.Sequential(nn.Dropout(0.2), copy.deepcopy(model))

    class NeedsDropout(Good):
        def _fit(self, objective, *, progress_bar):
            assert any(isinstance(module, nn.Dropout) for module in self.model.modules())
            super()._fit(objective, progress_bar=progress_bar)

    checks = ["closed-form-network", "closed-form-frozen"]
    assert check_estimator(NeedsDropout, exact="ggn", adapt=with_dropout, checks=checks).passed
    assert check_estimator(NeedsDropout, exact="ggn", checks=checks, raises=False).failed
