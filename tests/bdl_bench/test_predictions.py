"""The arrays of a record: every set of rows under its name, targets where there are any, inputs over a plot grid."""

import numpy as np
import pytest
import torch
from torch import nn

from bdl_bench.metrics import evaluate, parts
from bdl_bench.problem import Problem
from bdl_bench.records.predictions import Predictor
from estimators import Gaussian, LastLayerLaplace, LinearResponse, MeanAbsolute, RegVar

GENERATOR = torch.Generator().manual_seed(0)
X, Y = (torch.randn(7, 1, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
BATCHES = [(X[:4], Y[:4]), (X[4:], Y[4:])]
LINE = [torch.linspace(-1, 0, 3).double().unsqueeze(1), torch.linspace(0.5, 1, 2).double().unsqueeze(1)]


@pytest.fixture
def problem():
    model = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)).double().eval()
    return Problem(
        model, "regression", BATCHES, BATCHES, BATCHES, prior_precision=0.5,
        ood={"bare": [X[:2], X[2:3]], "known": BATCHES}, shifts={"noise-1": BATCHES}, plot_grid=LINE,
    )  # fmt: skip


@pytest.fixture
def estimator(problem):
    return LastLayerLaplace(problem.model, "regression", prior_precision=0.5).fit(problem.train)


@pytest.fixture
def predictor(problem, estimator):
    return Predictor(problem, estimator, estimator.predict)


def test_a_set_without_targets_has_predictions_alone(predictor):
    arrays = predictor.other_sets()
    assert {name for name in arrays if name.startswith("ood/bare/")} == {
        f"ood/bare/{name}" for name in ("mean", "epistemic_variance", "total_variance", "row_id")
    }
    assert arrays["ood/bare/mean"].shape == (3, 1)
    assert np.array_equal(arrays["ood/known/targets"], Y.numpy())


def test_a_band_has_its_inputs_and_those_of_the_training_rows(estimator, predictor):
    arrays = predictor.other_sets()
    assert np.array_equal(arrays["plot_grid/x"], torch.cat(LINE).numpy())
    expected = estimator.predict(torch.cat(LINE)).mean.detach().numpy()
    assert arrays["plot_grid/mean"] == pytest.approx(expected, rel=1e-12)
    assert np.array_equal(arrays["train/x"], X.numpy())
    assert np.array_equal(arrays["train/targets"], Y.numpy())


def test_a_band_is_drawn_and_not_scored(predictor):
    arrays = predictor.test() | predictor.other_sets()
    assert set(parts(arrays).ood) == {"bare", "known"}
    scored = {name: array for name, array in arrays.items() if name.split("/")[0] not in ("plot_grid", "train")}
    assert evaluate("regression", arrays) == evaluate("regression", scored)


def classes(n_outputs=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    y = torch.randint(n_outputs, (12,), generator=generator)
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, n_outputs)).double().eval()
    return Problem(
        model, "classification", batches, batches, batches, prior_precision=0.5, ood={"far": [9 * x[:4], 9 * x[4:7]]}
    )


def test_centred_variances_are_those_without_the_common_level():
    problem = classes()
    estimator = LastLayerLaplace(problem.model, "classification", prior_precision=0.5).fit(problem.train)
    arrays = Predictor(problem, estimator, estimator.predict).other_sets()
    centring = torch.eye(3, dtype=torch.float64) - 1 / 3
    x = torch.cat([batch[0] for batch in problem.test])
    expected = (centring @ estimator.covariance(x) @ centring).diagonal(dim1=1, dim2=2)
    assert arrays["centred_variance"] == pytest.approx(expected.numpy(), rel=1e-10)
    assert arrays["ood/far/centred_variance"].shape == (7, 3)


def test_a_method_without_covariances_has_no_centred_variance():
    problem = classes()
    estimator = RegVar(
        problem.model, "classification", prior_precision=0.5, regularizer=MeanAbsolute(), solver=LinearResponse()
    ).fit(problem.train)
    arrays = Predictor(problem, estimator, estimator.predict).other_sets()
    assert "ood/far/epistemic_variance" in arrays
    assert not any(name.endswith("centred_variance") for name in arrays)


@pytest.mark.parametrize("shared", [True, False])
def test_arrays_are_in_the_unit_of_the_target(shared):
    """The same predictions as those of the standardised problem, converted by hand; two outputs."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(9, 3, generator=generator).double(), torch.randn(9, 2, generator=generator).double()
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().eval()
    shift, scale = torch.tensor([3.0, -1.0]).double(), torch.tensor([2.0, 2.0 if shared else 0.5]).double()
    found = []
    for likelihood in (Gaussian(0.7), Gaussian(0.7, target_shift=shift, target_scale=scale)):
        problem = Problem(model, likelihood, batches, batches, batches, prior_precision=0.5, ood={"known": batches})
        estimator = LastLayerLaplace(model, likelihood, prior_precision=0.5).fit(problem.train)
        found.append(Predictor(problem, estimator, estimator.predict_uncalibrated).all_sets())
    plain, units = found
    shift, scale = shift.numpy(), scale.numpy()
    for prefix in ("", "validation/", "ood/known/"):
        for name in ("mean", "targets"):
            assert units[prefix + name] == pytest.approx(shift + scale * plain[prefix + name], rel=1e-12)
        for name in ("epistemic_variance", "total_variance"):
            assert units[prefix + name] == pytest.approx(scale**2 * plain[prefix + name], rel=1e-12)
    plain_metrics, metrics = (evaluate("regression", arrays) for arrays in found)
    assert metrics["reg/NLL"] == pytest.approx(plain_metrics["reg/NLL"] + np.log(scale).sum(), rel=1e-9)
    assert metrics["reg/jNLL"] == pytest.approx(plain_metrics["reg/jNLL"] + np.log(scale).sum(), rel=1e-9)
    assert metrics["cp/coverage" if "cp/coverage" in metrics else "cov/90"] == pytest.approx(
        plain_metrics["cp/coverage" if "cp/coverage" in metrics else "cov/90"]
    )
    if shared:
        assert metrics["reg/ES"] == pytest.approx(2 * plain_metrics["reg/ES"], rel=1e-9)
        assert metrics["reg/RMSE"] == pytest.approx(2 * plain_metrics["reg/RMSE"], rel=1e-9)
    else:
        assert "energy_score" in plain
        assert "energy_score" not in units
