"""What tuning rejects, and what it says."""

import numpy as np
import pytest
import torch
from tuning_toys import laplace, toy

from estimators import LinearizedLaplace, optimize_prior_precision, tune
from estimators.baselines.map import MAP
from estimators.errors import DataError, NotFittedError, OptionError, UnsupportedError


def test_invalid_input_is_rejected():
    problem = toy("classification")
    estimator, rows = laplace(problem), problem.validation
    groups = laplace(problem, prior_precision={"*.bias": 0.1, "*": 1.0})
    plain = MAP(problem.model, "classification").fit(problem.train)
    with pytest.raises(UnsupportedError, match=r"marginal likelihood.*MAP"):
        optimize_prior_precision(plain, method="marglik")
    with pytest.raises(UnsupportedError, match='inverse="cg"'):
        optimize_prior_precision(laplace(problem, inverse="cg"), method="marglik")
    with pytest.raises(OptionError, match=r"gridsearch.*'bayes'"):
        optimize_prior_precision(estimator, rows, method="bayes")
    with pytest.raises(OptionError, match="no custom score with marglik"):
        optimize_prior_precision(estimator, rows, method="marglik", score=len)
    with pytest.raises(OptionError, match="validation rows"):
        optimize_prior_precision(estimator)
    with pytest.raises(OptionError, match="score"):
        optimize_prior_precision(estimator, rows, score="mse")
    with pytest.raises(OptionError, match="values to try for prior_precision"):
        optimize_prior_precision(groups, rows)
    with pytest.raises(OptionError, match="one number for prior_precision in marglik"):
        optimize_prior_precision(groups, method="marglik", grid=[1.0])
    with pytest.raises(OptionError, match="an option of LinearizedLaplace"):
        tune(estimator, rows, option="rate", values=[0.1])
    with pytest.raises(OptionError, match="values to try for rank"):
        tune(estimator, rows, option="rank")
    with pytest.raises(OptionError, match="no values without an option"):
        tune(estimator, rows, option=None, values=[1.0])
    with pytest.raises(UnsupportedError, match="sigma_noise"):
        tune(estimator, rows, option="sigma_noise")
    with pytest.raises(DataError, match="iterated more than once"):
        tune(estimator, iter(rows))
    with pytest.raises(DataError, match="at least one row"):
        tune(estimator, [])
    with pytest.raises(DataError, match="integer class indices"):
        tune(estimator, [(x, y.double()) for x, y in rows])
    with pytest.raises(NotFittedError):
        tune(LinearizedLaplace(problem.model, "classification"), rows)


def test_values_may_be_numbers_of_any_type_and_the_given_one_is_not_fitted_again():
    problem = toy("classification")
    estimator = laplace(problem, prior_precision=2.0)
    for values in (np.array([0.5, 2.0, 8.0]), torch.tensor([8.0, 0.5, 2.0]), [np.float32(8), torch.tensor(0.5), 2]):
        found = tune(estimator, problem.validation, values=values)
        assert [point.value for point in found.trials] == [0.5, 2.0, 8.0]
        assert all(type(point.value) in (int, float) for point in found.trials)
        assert found.fits == 2
        assert found.score_grid().values == (0.5, 2.0, 8.0)
    groups = laplace(problem, prior_precision={"0.*": 2.0, "*": 1.0})
    found = tune(groups, problem.validation, values=[{"0.*": 2, "*": torch.tensor(1.0)}, {"0.*": 3, "*": 1}])
    assert found.fits == 1
