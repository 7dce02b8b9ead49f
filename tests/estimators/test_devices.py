"""Every estimator on a simulated accelerator: the numbers of the CPU, on the device, and no tensors of two devices."""

import pytest
import torch
from device_fits import ROWS, answers, assert_same, fits, made
from simulated_device import DEVICE, generators_of_the_device

from estimators.errors import NotFittedError, UnsupportedError

CPU = torch.device("cpu")
NOT_SAVED = {"two networks", "laplace-torch, full", "laplace-torch, kron", "laplace-torch, last layer"}


@pytest.fixture(autouse=True)
def _generators():
    with generators_of_the_device():
        yield


@pytest.mark.parametrize("name", ROWS)
def test_an_estimator_gives_on_a_device_the_numbers_of_the_cpu(name):
    both = fits(name)
    expected = answers(both.here, both.case.queries)
    assert_same(expected, answers(both.there, both.case_there.queries))


def _variance(estimator, case):
    try:
        return estimator.variance(case.queries)
    except NotFittedError:
        return estimator.attach(case.loader).variance(case.queries)


@pytest.mark.parametrize("name", [name for name in ROWS if name not in NOT_SAVED])
def test_a_fit_saved_on_one_device_is_loaded_on_the_other(name, tmp_path):
    both = fits(name)
    expected = {"variance": both.here.variance(both.case.queries)}
    for saved, case in ((both.here, both.case_there), (both.there, both.case)):
        saved.save(tmp_path / "fit")
        loaded = made(ROWS[name], case).load(tmp_path / "fit")
        assert_same(expected, {"variance": _variance(loaded, case)}, device=case.device, rtol=1e-9)


@pytest.mark.parametrize("name", NOT_SAVED)
def test_what_cannot_be_saved_says_so(name, tmp_path):
    with pytest.raises(UnsupportedError):
        fits(name).there.save(tmp_path / "fit")
    assert DEVICE != CPU
