"""Methods that need a label for every row reject rows with the `ignore_index` of the likelihood, whatever it is."""

import pytest

from estimators import Categorical, SplitConformal
from estimators.baselines import DDU, MAP, GaussianProcess
from estimators.errors import DataError, UnsupportedError
from estimators.variational import VBLL

INDICES = [-100, 0, 255]
every_index = pytest.mark.parametrize("ignore_index", INDICES)


def loader_of(problem, first):
    """The rows with another label in row 0, and classes 1 and 2 in the others."""
    y = problem.y.clamp_min(1)
    y[0] = first
    return [(problem.x, y)]


@every_index
@pytest.mark.parametrize("method", [GaussianProcess, DDU, VBLL])
def test_a_row_without_a_label_is_rejected_by_methods_that_need_labels(method, ignore_index, make_problem):
    problem = make_problem("classification")
    estimator = method(problem.model, Categorical(ignore_index=ignore_index))
    with pytest.raises(UnsupportedError, match="label"):
        estimator.fit(loader_of(problem, ignore_index))
    assert estimator.fit(loader_of(problem, 1)).predict(problem.query).probs.shape == (7, 3)


@every_index
def test_conformal_scores_of_rows_without_a_label_are_rejected(ignore_index, make_problem):
    problem = make_problem("classification")
    conformal = SplitConformal(MAP(problem.model, Categorical(ignore_index=ignore_index)).fit(loader_of(problem, 1)))
    with pytest.raises(DataError, match="rows without a label"):
        conformal.fit(loader_of(problem, ignore_index))
    assert len(conformal.fit(loader_of(problem, 1)).scores_) == 20
