"""Checks of saving and loading a fit."""

from __future__ import annotations

from torch import Tensor

from estimators.errors import NotFittedError
from estimators.estimator.base import UncertaintyEstimator
from estimators.testing.cases import Case
from estimators.testing.estimator_under_test import UNSUPPORTED_ERRORS, EstimatorUnderTest, as_array
from estimators.testing.outcomes import NotApplicable
from estimators.testing.registry import check

__all__: list[str] = []


@check("state-round-trip")
def state_round_trip(tested: EstimatorUnderTest) -> None:
    """A new estimator with the state of a fitted one has its variance, with data attached if it needs them."""
    case = tested.cases["classification"]
    fitted = tested.fitted(case)
    try:
        state = fitted.state_dict()
        loaded = tested.build(case, fitted.model).load_state_dict(state)
    except UNSUPPORTED_ERRORS as error:
        raise NotApplicable(f"cannot be saved: {error}") from error
    received = as_array(_variance(loaded, case))
    fault = "_get_fit_state leaves out what _variance needs, or _set_fit_state does not put it back."
    tested.compare("the variance of the saved fit", received, tested.variance(case), fault=fault, rtol=1e-7)


def _variance(loaded: UncertaintyEstimator, case: Case) -> Tensor:
    try:
        return loaded.variance(case.queries)
    except NotFittedError:
        return loaded.attach_data(case.loader).variance(case.queries)
