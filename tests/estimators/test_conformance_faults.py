"""Seeded faults: for every check of the kit an estimator that is wrong in one way, and the check that must find it."""

import copy
from dataclasses import replace

import pytest
import torch
from faults import (
    Accumulating,
    AlwaysDouble,
    ChangedWeight,
    DetachedJacobian,
    DiagonalCovariance,
    DisplacementsForWeights,
    EmptyIsFine,
    EvalFirst,
    FirstRowsOnly,
    Flat,
    FrozenToo,
    GlobalRandomNumbers,
    Good,
    HalfOfTheGraph,
    HalfSaved,
    HookAtQuery,
    IndependentRows,
    MeanLoss,
    ModelMayChange,
    NearIsFar,
    NoFunctional,
    OneNoise,
    OnePrior,
    OnlyFullBatches,
    OtherMean,
    OtherOrder,
    PaddedQueries,
    PrecisionForCovariance,
    RawError,
    ReturnsNothing,
    RootTooMany,
    RunsInConstructor,
    ScoreOfTheBatch,
    Squeezed,
    TensorsOnly,
    TrainModeAfterFit,
    TransposedBoth,
    TransposedCovariance,
    TransposedSamples,
    Unchecked,
    UnfreezesWhileFitting,
    Unseeded,
    both,
    broadcast,
    fit,
    half_precision,
    independent_rows,
    is_binary,
    loader,
    noise_of,
    prediction,
    rejecting,
    samples,
    variance,
    with_prior,
    without_nan,
)
from torch import nn

from estimators.testing import CHECKS, ConformanceError, check_estimator

EXACT, APPROXIMATE = {"exact": "ggn"}, {"prior_of": "all"}

FAULTS = {
    "rejects everything": (rejecting, APPROXIMATE, "supports-a-model"),
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
    "mean of losses": (MeanLoss, APPROXIMATE, "data-reduce-variance"),
    "mean of losses, exact": (MeanLoss, EXACT, "closed-form-regression"),
    "standard deviation": (both(lambda v, *_: v.sqrt()), APPROXIMATE, "noise-scaling"),
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
    "a score relative to the batch": (ScoreOfTheBatch, APPROXIMATE, "score"),
    "a score that is high near the data": (NearIsFar, APPROXIMATE, "score"),
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
    "a raw error": (RawError, APPROXIMATE, "optional-queries"),
    "weights in another order": (OtherOrder, APPROXIMATE, "jacobians"),
    "rows taken as independent": (IndependentRows, EXACT, "joint-covariance"),
    "a precision for a covariance": (PrecisionForCovariance, APPROXIMATE, "posterior-matrices"),
    "weights without the trained ones": (DisplacementsForWeights, APPROXIMATE, "weight-samples"),
    "weights of a root too many": (RootTooMany, APPROXIMATE, "weight-moments"),
    "a detached Jacobian": (DetachedJacobian, APPROXIMATE, "input-gradients"),
    "half of the graph": (HalfOfTheGraph, APPROXIMATE, "input-gradients"),
    "half of the state": (HalfSaved, APPROXIMATE, "state-round-trip"),
}


@pytest.mark.parametrize(("make", "capabilities", "name"), FAULTS.values(), ids=FAULTS.keys())
def test_a_seeded_fault_is_found_by_the_check_that_is_meant_for_it(make, capabilities, name):
    report = check_estimator(make, checks=[name], raises=False, **capabilities)
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
