"""Importing the library is light, and its public names are those of the contract."""

import subprocess
import sys

import pytest

import estimators

HEAVY = [
    "laplace",
    "backpack",
    "curvlinops",
    "torchvision",
    "matplotlib",
    "sklearn",
    "scipy",
    "pandas",
    "rich",
    "bdl_bench",
]


@pytest.fixture(scope="module")
def loaded():
    code = "import estimators, sys; print(' '.join(sorted({name.partition('.')[0] for name in sys.modules})))"
    answer = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.split()


def test_the_library_is_loaded(loaded):
    assert "estimators" in loaded
    assert "torch" in loaded


@pytest.mark.parametrize("package", HEAVY)
def test_importing_the_library_does_not_load(package, loaded):
    assert package not in loaded


def test_every_public_name_is_there():
    assert sorted(estimators.__all__) == estimators.__all__
    for name in estimators.__all__:
        assert getattr(estimators, name).__doc__
