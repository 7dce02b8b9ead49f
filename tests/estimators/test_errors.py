"""Errors that cross from one process to another."""

import pickle

import pytest

from estimators.errors import ConvergenceError, EstimatorError, IndefiniteHessianError, TooLargeError


@pytest.mark.parametrize(
    "error",
    [
        ConvergenceError("an end", received="none", remedy="patience."),
        IndefiniteHessianError(smallest=-1.0, largest=2.0),
        TooLargeError("a matrix", bytes_needed=2**40, bytes_available=2**30, remedy="less."),
    ],
)
def test_an_error_arrives_from_another_process_as_it_was(error):
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error)
    assert isinstance(arrived, EstimatorError)
    assert str(arrived) == str(error)
    assert vars(arrived) == vars(error)
