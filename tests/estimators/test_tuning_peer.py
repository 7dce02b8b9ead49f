"""The search of laplace-torch 0.3 beside ours, on one posterior, grid and rows: its running mean misleads it.

The numbers of docs/guide/tuning.md are these.
"""

import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from tuning_toys import SIGMA, laplace, toy

from estimators import optimize_prior_precision

EXPONENTS = np.linspace(-4, 4, 21)
GRID = [float(10**exponent) for exponent in EXPONENTS]


@pytest.fixture
def peer():
    """Its import and its methods warn of their own dependencies; it makes tensors of the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("laplace", exc_type=(ImportError, RuntimeError))
    torch.set_default_dtype(before)


def loader(x, y, size):
    return DataLoader(TensorDataset(torch.tensor(x), torch.tensor(y)), batch_size=size)


def their_pick(peer, problem):
    options = {"sigma_noise": SIGMA} if problem.kind == "regression" else {}
    fitted = peer.Laplace(
        problem.model,
        problem.kind,
        subset_of_weights="all",
        hessian_structure="full",
        prior_precision=problem.delta,
        backend=peer.curvature.CurvlinopsGGN,
        **options,
    )
    fitted.fit(loader(problem.x, problem.y, 9))
    fitted.optimize_prior_precision(
        pred_type="glm",
        method="gridsearch",
        val_loader=loader(problem.x_val, problem.y_val, 7),
        log_prior_prec_min=EXPONENTS[0],
        log_prior_prec_max=EXPONENTS[-1],
        grid_size=len(EXPONENTS),
    )
    return float(fitted.prior_precision)


def our_pick(problem):
    return optimize_prior_precision(laplace(problem), problem.validation, grid=GRID)


def test_in_classification_its_running_mean_overshoots_and_ours_is_right(peer):
    problem = toy("classification")
    ours, theirs = our_pick(problem), their_pick(peer, problem)
    scores = [problem.score(delta) for delta in GRID]
    running = np.cumsum(scores) / np.arange(1, len(scores) + 1)
    assert theirs == pytest.approx(GRID[int(np.argmin(running))])
    assert ours.value == pytest.approx(GRID[int(np.argmin(scores))])
    assert [round(ours.value, 3), round(theirs, 3)] == [0.158, 1.0]
    assert [round(problem.score(delta), 3) for delta in (ours.value, theirs)] == [0.886, 0.953]
    assert problem.score(theirs) > ours.chosen.score + 0.06


def test_in_regression_it_scores_a_mean_that_does_not_depend_on_the_prior(peer):
    problem = toy("regression")
    ours, theirs = our_pick(problem), their_pick(peer, problem)
    scores = [problem.score(delta) for delta in GRID]
    assert ours.value == pytest.approx(GRID[int(np.argmin(scores))])
    assert ours.chosen.score == pytest.approx(min(scores), rel=1e-9)
    assert theirs != pytest.approx(ours.value)
    assert [round(ours.value, 3), round(ours.chosen.score, 3)] == [1.0, 1.537]
