"""Predictions of several places a row as flat rows: those with a label, in order, and nothing else."""

import pytest
import torch

from bdl_bench.problem.flatten import flat_rows, row_of_each
from estimators import Bernoulli, Categorical, Gaussian
from estimators.errors import DataError
from estimators.likelihoods import CausalTokens

B, T, V, S = 3, 5, 4, 6


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def predicted(likelihood, *shape, sampled=False):
    samples = random(S, *shape) if sampled else None
    return likelihood.predict(random(*shape), random(*shape).square(), samples)


def token_labels():
    labels = torch.arange(B * T).reshape(B, T) % V
    labels[1, 3:] = -100
    labels[2, 0] = -100
    return labels


def causal_places(labels):
    """(row, place, token that follows), written out."""
    return [(b, t, int(labels[b, t + 1])) for b in range(B) for t in range(T - 1) if labels[b, t + 1] != -100]


@pytest.mark.parametrize("sampled", [False, True])
def test_a_causal_prediction_is_a_row_for_each_token_that_follows_and_has_a_label(sampled):
    prediction, labels = predicted(CausalTokens(), B, T, V, sampled=sampled), token_labels()
    flat, targets = flat_rows(prediction, labels, CausalTokens())
    places = causal_places(labels)
    assert targets.tolist() == [token for _, _, token in places]
    for name in ("mean", "epistemic_variance", "probs", "entropy"):
        by_hand = torch.stack([getattr(prediction, name)[b, t] for b, t, _ in places])
        assert torch.equal(getattr(flat, name), by_hand), name
    if sampled:
        assert torch.equal(flat.samples, torch.stack([prediction.samples[:, b, t] for b, t, _ in places], dim=1))
    assert flat.mean.shape == (10, V)


def test_the_flat_log_probabilities_of_the_targets_are_those_of_the_likelihood():
    likelihood, mean, labels = CausalTokens(), random(B, T, V), token_labels()
    flat, targets = flat_rows(likelihood.predict(mean, torch.zeros_like(mean), None), labels, likelihood)
    score = -flat.probs.gather(1, targets[:, None]).log().sum()
    assert torch.allclose(score, likelihood.nll(mean.flatten(1), labels).sum(), rtol=1e-12)


def test_pixels_of_classes_first_are_rows_without_the_void_ones():
    likelihood = Categorical(class_dim=1, ignore_index=9)
    prediction = predicted(likelihood, B, V, 2, 3)
    labels = torch.arange(B * 6).reshape(B, 2, 3) % V
    labels[0, 1, 2] = 9
    flat, targets = flat_rows(prediction, labels, likelihood)
    places = [(b, i, j) for b in range(B) for i in range(2) for j in range(3) if (b, i, j) != (0, 1, 2)]
    assert targets.tolist() == [int(labels[place]) for place in places]
    assert torch.equal(flat.mean, torch.stack([prediction.mean[b, :, i, j] for b, i, j in places]))
    assert torch.equal(flat.entropy, torch.stack([prediction.entropy[place] for place in places]))
    assert torch.allclose(flat.probs.sum(-1), torch.ones(len(places), dtype=torch.float64))


@pytest.mark.parametrize(("likelihood", "shape"), [(CausalTokens(), (B, T, V)), (Categorical(class_dim=1), (B, V, T))])
@pytest.mark.parametrize("sampled", [False, True])
def test_to_calibrate_and_to_flatten_may_be_done_in_either_order(likelihood, shape, sampled):
    prediction, labels = predicted(likelihood, *shape, sampled=sampled), token_labels()
    options = {"variance_scale": 2.5, "softmax_temperature": 1.7}
    first = flat_rows(prediction.calibrated(**options), labels, likelihood)[0]
    last = flat_rows(prediction, labels, likelihood)[0].calibrated(**options)
    for name in ("mean", "epistemic_variance", "probs", "entropy"):
        assert torch.allclose(getattr(first, name), getattr(last, name), rtol=1e-12), name


def test_one_class_a_row_is_left_as_it_is():
    prediction, labels = predicted(Categorical(), B, V, sampled=True), torch.tensor([0, 3, 1])
    flat, targets = flat_rows(prediction, labels, Categorical())
    assert torch.equal(targets, labels)
    for name in ("mean", "epistemic_variance", "probs", "entropy", "samples"):
        assert torch.equal(getattr(flat, name), getattr(prediction, name)), name


@pytest.mark.parametrize("sampled", [False, True])
def test_one_class_a_row_is_left_out_where_the_label_is_ignored(sampled):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    samples = torch.randn(7, 5, 3, generator=generator, dtype=torch.float64) if sampled else None
    labels = torch.tensor([2, -100, 0, 1, -100])
    prediction = Categorical().predict(mean, torch.ones_like(mean), samples)
    flat, targets = flat_rows(prediction, labels, Categorical())
    kept = [0, 2, 3]
    assert targets.tolist() == [2, 0, 1]
    torch.testing.assert_close(flat.probs, prediction.probs[kept])
    torch.testing.assert_close(flat.entropy, prediction.entropy[kept])
    assert row_of_each(prediction, labels, Categorical()).tolist() == kept


@pytest.mark.parametrize("likelihood", [Gaussian(sigma_noise=0.6), Bernoulli()])
def test_numbers_of_several_dimensions_are_the_outputs_of_their_row(likelihood):
    prediction, y = predicted(likelihood, B, T, V), random(B, T, V).sign().clamp(min=0)
    flat, targets = flat_rows(prediction, y, likelihood)
    assert torch.equal(targets, y.reshape(B, T * V))
    assert torch.equal(flat.mean, prediction.mean.reshape(B, T * V))
    noisy = "total_variance" if likelihood.kind == "regression" else "entropy"
    assert torch.equal(getattr(flat, noisy), getattr(prediction, noisy).reshape(B, T * V))


def test_without_targets_every_place_counts():
    flat, targets = flat_rows(predicted(CausalTokens(), B, T, V), None, CausalTokens())
    assert targets is None
    assert torch.equal(flat.mean, random(B, T, V).reshape(B * T, V))
    alone, _ = flat_rows(predicted(Categorical(), B, V), None, Categorical())
    assert torch.equal(alone.mean, random(B, V))
    image, _ = flat_rows(predicted(Categorical(class_dim=1), B, V, T), None, Categorical(class_dim=1))
    assert torch.equal(image.mean, random(B, V, T).movedim(1, -1).reshape(B * T, V))


class GaussianWithMissingTargets(Gaussian):
    """A target of −999 is missing; what `given` returns is never used here."""

    def given(self, y):
        return self if bool((y != -999).all()) else Gaussian()


def test_scored_rows_with_missing_targets_raise_instead_of_counting_as_observed():
    likelihood, y = GaussianWithMissingTargets(), random(B, 2)
    prediction = predicted(likelihood, B, 2)
    assert torch.equal(flat_rows(prediction, y, likelihood)[1], y)
    y[1, 0] = -999
    with pytest.raises(DataError, match="a target for every output"):
        flat_rows(prediction, y, likelihood)
