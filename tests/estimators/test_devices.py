"""Every estimator on a simulated accelerator: the numbers of the CPU, on the device, and no tensors of two devices."""

import numpy
import pytest
import torch
from conformance_row import names_of
from device_fits import DIRECT, QUESTIONS, ROWS, answers, assert_same, fits, made
from faults import DEVICE_FAULTS
from simulated_device import DEVICE, DeviceTensor, generators_of_the_device

from estimators.errors import NotFittedError, OptionError, UnsupportedError
from estimators.testing import check_estimator

NOT_SAVED = {"two networks", "laplace-torch, full", "laplace-torch, kron", "laplace-torch, last layer"}


@pytest.fixture(autouse=True)
def _generators():
    with generators_of_the_device():
        yield


SOLVES = [name for name in ROWS if any(word in name for word in ("newton", "cg", "pointwise", "signed"))]
"""Rows that solve a system for each query: slow."""
REFITS = ["pointwise, newton"]
"""Rows that refit the network for each query: very slow, and they store what other rows of RegVar store."""


def assert_same_answers(name, questions):
    both, n = fits(name), 1 if name in SOLVES else 2
    expected = answers(both.here, both.case.queries[:n], questions)
    assert_same(expected, answers(both.there, both.case_there.queries[:n], questions))


@pytest.mark.parametrize("name", names_of(ROWS))
@pytest.mark.filterwarnings("ignore::estimators.errors.NotConvergedWarning")  # short recipes
def test_an_estimator_gives_on_a_device_the_numbers_of_the_cpu(name):
    assert_same_answers(name, () if name in REFITS else DIRECT if name in SOLVES else QUESTIONS)


@pytest.mark.verification
@pytest.mark.parametrize("name", SOLVES)
def test_what_is_made_of_solutions_has_on_a_device_the_numbers_of_the_cpu(name):
    assert_same_answers(name, QUESTIONS)


def _variance(estimator, case):
    try:
        return estimator.variance(case.queries[:1])
    except NotFittedError:
        return estimator.attach_data(case.loader).variance(case.queries[:1])


@pytest.mark.parametrize("name", names_of([name for name in ROWS if name not in NOT_SAVED], at_night=REFITS))
@pytest.mark.filterwarnings("ignore::estimators.errors.NotConvergedWarning")  # short recipes
def test_a_fit_saved_on_one_device_is_loaded_on_the_other(name, tmp_path):
    both = fits(name)
    expected = {"variance": both.here.variance(both.case.queries[:1])}
    for saved, case in ((both.here, both.case_there), (both.there, both.case)):
        saved.save(tmp_path / "fit")
        loaded = made(ROWS[name], case).load(tmp_path / "fit")
        assert_same(expected, {"variance": _variance(loaded, case)}, device=case.device, rtol=1e-9)


@pytest.mark.parametrize("name", sorted(NOT_SAVED))
def test_what_cannot_be_saved_says_so(name, tmp_path):
    with pytest.raises(UnsupportedError):
        fits(name).there.save(tmp_path / "fit")


UNSUPPORTED = {
    "sums": lambda here, there: here + there,
    "products": lambda here, there: here @ there,
    "a number of the device": lambda here, there: here + there.sum(),
    "joining": lambda here, there: torch.cat([here, there]),
    "stacked numbers": lambda here, there: torch.stack([here.sum(), there.sum()]),
    "rows of the CPU by an index of the device": lambda here, there: here[there.argmax(0)],
    "index_select by an index of the CPU": lambda here, there: there.index_select(0, here.argmax(0)),
    "values of the CPU put in": lambda here, there: there.index_put((torch.tensor([0]),), here[0]),
    "numpy": lambda _, there: there.numpy(),
    "an array": lambda _, there: numpy.asarray(there),
    "a generator of the CPU": lambda _, there: there.normal_(generator=torch.Generator()),
    "a generator of the device": lambda *_: torch.randn(2, generator=torch.Generator(DEVICE)),
}


@pytest.mark.parametrize("act", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_the_simulated_device_raises_where_an_accelerator_does(act):
    here, there = torch.eye(3), torch.eye(3, device=DEVICE)
    with pytest.raises((RuntimeError, TypeError), match="sim"):
        act(here, there)


def test_what_an_accelerator_takes_from_the_cpu_the_simulated_device_takes():
    there = torch.eye(3, device=DEVICE)
    found = [there + torch.tensor(1.0), there[torch.tensor([0, 2])], there[torch.tensor([True, False, True])]]
    found.append(torch.where(there > 0, torch.tensor(2.0), there))
    found.append(torch.randn(2, generator=torch.Generator(DEVICE).manual_seed(3), device=DEVICE))
    there[0] = torch.tensor(7.0)
    there[1].copy_(torch.ones(3))
    assert all(isinstance(tensor, DeviceTensor) and tensor.device == DEVICE for tensor in [*found, there])
    assert there.tolist() == [[7.0] * 3, [1.0] * 3, [0.0, 0.0, 1.0]]
    assert torch.equal(found[-1].cpu(), torch.randn(2, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("fault", DEVICE_FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_of_devices_that_the_cpu_does_not_show_is_found_on_the_device(fault):
    assert check_estimator(fault, checks=["dtype-device"]).passed == ["dtype-device"]
    report = check_estimator(fault, checks=["dtype-device"], device=DEVICE, raises=False)
    assert list(report.failed) == ["dtype-device"]
    assert "sim" in report.failed["dtype-device"]


KIT = ["shapes", "output-shape", "dtype-device", "closed-form-network", "closed-form-prior-groups"]
KIT += ["closed-form-noise-per-output", "closed-form-frozen", "constant-output", "sample-joint", "dict-inputs"]
KIT += ["jacobians", "joint-covariance", "posterior-matrices", "weight-samples", "weight-moments", "input-gradients"]
KIT += ["model-untouched-by-fit", "random-state-untouched", "rejects-nan", "notices-a-changed-model"]


@pytest.mark.parametrize(
    ("name", "checks"),
    [
        pytest.param("full", KIT[::2], id="full"),
        pytest.param("last layer", KIT[1::2], id="last layer"),
        pytest.param("full", KIT[1::2], id="full, others", marks=pytest.mark.verification),
        pytest.param("last layer", KIT[::2], id="last layer, others", marks=pytest.mark.verification),
    ],
)
def test_an_estimator_conforms_on_a_device(name, checks):
    report = check_estimator(ROWS[name].make, **ROWS[name].options, checks=checks, device=DEVICE)
    assert set(report.skipped) == ROWS[name].skipped & set(checks)


def test_a_device_that_is_not_there_is_rejected():
    with pytest.raises(OptionError, match="a device of this machine"):
        check_estimator(ROWS["full"].make, device="no such device")
