"""The whole conformance kit on a simulated accelerator, for every row of the table: ten minutes."""

import pytest
from conformance_baselines import BASELINES
from conformance_posteriors import POSTERIORS
from simulated_device import DEVICE, generators_of_the_device

from estimators.testing import CHECKS, check_estimator

ROWS = {**POSTERIORS, **BASELINES}


@pytest.mark.verification
@pytest.mark.parametrize("name", ROWS)
def test_the_whole_kit_holds_on_a_device(name):
    row = ROWS[name]
    with generators_of_the_device():
        report = check_estimator(row.make, **row.options, device=DEVICE, raises=False)
    assert report.failed == {}
    asked = set(row.options.get("checks", CHECKS))
    assert set(report.skipped) == (row.skipped | set(row.options.get("skip", {}))) & asked
