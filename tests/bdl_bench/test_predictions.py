"""The arrays of a record: every set of rows under its name, targets where there are any, inputs along a band."""

import numpy as np
import pytest
import torch
from torch import nn

from bdl_bench.metrics import evaluate, parts
from bdl_bench.predictions import beside_test, predicted
from bdl_bench.problem import Problem
from estimators import LastLayerLaplace

GENERATOR = torch.Generator().manual_seed(0)
X, Y = (torch.randn(7, 1, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
BATCHES = [(X[:4], Y[:4]), (X[4:], Y[4:])]
LINE = [torch.linspace(-1, 0, 3).double().unsqueeze(1), torch.linspace(0.5, 1, 2).double().unsqueeze(1)]


@pytest.fixture
def problem():
    model = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)).double().eval()
    return Problem(
        model, "regression", BATCHES, BATCHES, BATCHES, prior_precision=0.5,
        ood={"bare": [X[:2], X[2:3]], "known": BATCHES}, shifts={"noise-1": BATCHES}, band=LINE,
    )  # fmt: skip


@pytest.fixture
def estimator(problem):
    return LastLayerLaplace(problem.model, "regression", prior_precision=0.5).fit(problem.train)


def test_a_set_without_targets_has_predictions_alone(problem, estimator):
    arrays = beside_test(estimator.predict, problem)
    assert {name for name in arrays if name.startswith("ood/bare/")} == {
        f"ood/bare/{name}" for name in ("mean", "epistemic_variance", "total_variance")
    }
    assert arrays["ood/bare/mean"].shape == (3, 1)
    assert np.array_equal(arrays["ood/known/targets"], Y.numpy())


def test_a_band_has_its_inputs_and_those_of_the_training_rows(problem, estimator):
    arrays = beside_test(estimator.predict, problem)
    assert np.array_equal(arrays["band/x"], torch.cat(LINE).numpy())
    expected = estimator.predict(torch.cat(LINE)).mean.detach().numpy()
    assert arrays["band/mean"] == pytest.approx(expected, rel=1e-12)
    assert np.array_equal(arrays["train/x"], X.numpy())
    assert np.array_equal(arrays["train/targets"], Y.numpy())


def test_a_band_is_drawn_and_not_scored(problem, estimator):
    arrays = predicted(estimator.predict, problem.test) | beside_test(estimator.predict, problem)
    assert set(parts(arrays).ood) == {"bare", "known"}
    scored = {name: array for name, array in arrays.items() if name.split("/")[0] not in ("band", "train")}
    assert evaluate("regression", arrays) == evaluate("regression", scored)
