"""The tasks that download, on small files in the same formats: what is read, split, held out, shifted and trained."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_files import (
    cifar_batch,
    classes_of,
    pictures,
    write_cifar10,
    write_corrupted_cifar10,
    write_mnist,
    write_svhn,
    write_uci,
)

from bdl_bench.data import uci
from bdl_bench.data.cifar import cifar10
from bdl_bench.data.corrupted_cifar import CORRUPTIONS
from bdl_bench.data.folder import MissingDataError
from bdl_bench.problem.queries import queries, rows
from bdl_bench.records.problem_digest import problem_digest
from bdl_bench.tasks import TASKS
from bdl_bench.tasks.uci import UCI_SETS
from estimators.errors import DataError, OptionError
from estimators.training import train_map

DOWNLOADED = [
    "cifar10",
    "fashion-mnist",
    "mnist",
    *(f"uci-{each.name}{variant}" for each in UCI_SETS for variant in ("", "-400", "-gap")),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty data folder, and no network."""

    def fail(self, url, *_, **__):  # noqa: ARG001
        raise ConnectionError(f"no network in tests, not to {url}")

    monkeypatch.setenv("BDL_BENCH_DATA", str(tmp_path))
    monkeypatch.setattr("pooch.HTTPDownloader.__call__", fail)
    return tmp_path


@pytest.fixture
def mnist_files(folder):
    write_mnist(folder, "MNIST", seed=0)
    write_mnist(folder, "FashionMNIST", seed=1)
    return folder


@pytest.fixture
def cifar_files(folder):
    write_cifar10(folder)
    write_svhn(folder)
    write_corrupted_cifar10(folder, CORRUPTIONS)
    return folder


def all_rows(loader):
    batches = list(rows(loader))
    return torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches])


def row_set(x):
    return {row.numpy().tobytes() for row in x}


def train(problem, **recipe):
    """Some steps of its own recipe, with a prior for few rows; the loss per training row before and after."""
    before = loss(problem)
    train_map(
        problem.model, problem.likelihood, problem.train,
        prior_precision=0.1, recipe=dataclasses.replace(problem.recipe, **recipe),
    )  # fmt: skip
    return before, loss(problem)


def loss(problem):
    x, y = all_rows(problem.train)
    problem.model.eval()
    with torch.no_grad():
        return problem.likelihood.nll(problem.model(x), y).mean().item()


@pytest.mark.parametrize(("name", "other"), [("mnist", "FashionMNIST"), ("fashion-mnist", "MNIST")])
@pytest.mark.usefixtures("mnist_files")
def test_mnist_is_split_scaled_and_has_its_sibling_out_of_distribution(name, other):
    problem = TASKS[name].problem(0)
    parts = [all_rows(part) for part in (problem.train, problem.validation, problem.test)]
    assert [tuple(x.shape) for x, _ in parts] == [(50, 1, 28, 28), (10, 1, 28, 28), (20, 1, 28, 28)]
    assert len(set().union(*(row_set(x) for x, _ in parts))) == 80
    assert problem.n_parameters == 61_706
    assert parts[0][0].dtype == torch.float32
    assert parts[0][0].mean().item() == pytest.approx(0, abs=1e-5)
    assert parts[0][0].std(correction=0).item() == pytest.approx(1, abs=1e-5)
    (query,) = queries(problem.ood[other])
    assert query.y is None
    assert query.x.shape == (20, 1, 28, 28)


@pytest.mark.usefixtures("mnist_files")
def test_an_image_of_mnist_keeps_its_label_and_its_pixels():
    x, y = all_rows(TASKS["mnist"].problem(0).test)
    expected = pictures(classes_of(20), (28, 28), seed=20)
    train_rows = pictures(classes_of(60), (28, 28), seed=60)
    order = np.random.default_rng(0).permutation(60)[:50]
    mean, std = train_rows[order].mean() / 255, train_rows[order].std() / 255
    assert torch.equal(y, torch.from_numpy(classes_of(20)))
    reference = torch.from_numpy((expected / 255 - mean) / std).float().unsqueeze(1)
    assert torch.allclose(x, reference, atol=1e-5)


@pytest.mark.usefixtures("mnist_files")
def test_a_lenet_learns_small_mnist():
    before, after = train(TASKS["mnist"].problem(0), epochs=30, batch_size=10)
    assert after < 0.8 * before


@pytest.mark.usefixtures("cifar_files")
def test_cifar_is_split_and_has_svhn_out_of_distribution_and_corruptions_as_shifts():
    problem = TASKS["cifar10"].problem(1)
    parts = [all_rows(part) for part in (problem.train, problem.validation, problem.test)]
    assert [tuple(x.shape) for x, _ in parts] == [(18, 3, 32, 32), (2, 3, 32, 32), (10, 3, 32, 32)]
    assert len(set().union(*(row_set(x) for x, _ in parts))) == 30
    assert parts[0][0].mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert torch.equal(parts[2][1], torch.from_numpy(classes_of(10)))
    assert problem.n_parameters == 11_173_962
    (query,) = queries(problem.ood["SVHN"])
    assert query.y is None
    assert query.x.shape == (12, 3, 32, 32)
    assert set(problem.shifts) == {f"{name}-{severity}" for name in CORRUPTIONS for severity in range(1, 6)}


@pytest.mark.usefixtures("cifar_files")
def test_a_corruption_of_cifar_is_cut_by_severity_and_scaled_like_the_test_images():
    problem = TASKS["cifar10"].problem(0)
    bytes_seen = []
    for severity in (1, 5):
        x, y = all_rows(problem.shifts[f"{CORRUPTIONS[2]}-{severity}"])
        assert torch.equal(y, torch.from_numpy(classes_of(10)))
        assert x.shape == (10, 3, 32, 32)
        bytes_seen.append(x)
    _, scale = problem.test.dataset.images, problem.test.dataset.scale
    spread = (bytes_seen[1] - bytes_seen[0])[0, :, 0, 0] * scale.std * 255
    assert spread.tolist() == pytest.approx([4, 4, 4], abs=1e-3)


@pytest.mark.usefixtures("cifar_files")
def test_the_training_images_of_cifar_come_in_another_order_each_pass_and_the_same_for_a_seed():
    first, again = (TASKS["cifar10"].problem(3) for _ in range(2))
    passes = [all_rows(loader)[0] for loader in (first.train, first.train, again.train)]
    assert not torch.equal(passes[0], passes[1])
    assert row_set(passes[0]) == row_set(passes[1])
    assert torch.equal(passes[0], passes[2])


def test_a_resnet_takes_some_steps_on_small_cifar(folder):
    write_cifar10(folder, a_batch=2, test=2)
    write_svhn(folder, n=2)
    write_corrupted_cifar10(folder, CORRUPTIONS, test=2)
    problem = TASKS["cifar10"].problem(0)
    before = [p.detach().clone() for p in problem.model.parameters()]
    _, after = train(problem, epochs=2)
    assert np.isfinite(after)
    assert all(not torch.equal(p, q) for p, q in zip(problem.model.parameters(), before, strict=True))
    assert all(torch.isfinite(p).all() for p in problem.model.parameters())


def test_a_batch_that_would_run_code_is_rejected(folder):
    write_cifar10(folder)
    path = folder / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(b"cos\nsystem\n(S'echo run'\ntR.")
    with pytest.raises(ValueError, match=r"os\.system"):
        cifar10("test")


@pytest.mark.parametrize("content", [b"", b"not a pickle", cifar_batch(classes_of(3), 0)[:200], b"(dp0\n."])
def test_a_broken_batch_is_named(folder, content):
    write_cifar10(folder)
    (folder / "cifar-10-batches-py" / "data_batch_3").write_bytes(content)
    with pytest.raises(ValueError, match="data_batch_3"):
        cifar10("train")


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("mnist", ["MNIST/raw/train-images-idx3-ubyte"]),
        ("fashion-mnist", ["FashionMNIST/raw/t10k-labels-idx1-ubyte"]),
        ("cifar10", ["CIFAR-10-C/fog.npy"]),
        ("cifar10", ["SVHN/test_32x32.mat"]),
        ("cifar10", ["CIFAR-10-C/labels.npy"]),
    ],
)
def test_a_broken_file_is_named(mnist_files, name, files):
    write_cifar10(mnist_files)
    write_svhn(mnist_files)
    write_corrupted_cifar10(mnist_files, CORRUPTIONS)
    for file in files:
        (mnist_files / file).write_bytes(b"\0broken")
    with pytest.raises(ValueError, match=files[0].replace("/", ".")):
        TASKS[name].problem(0)


@pytest.mark.parametrize("each", UCI_SETS, ids=lambda each: each.name)
def test_a_set_of_uci_has_the_rows_of_its_published_split(folder, each):
    table = write_uci(folder, each.folder, inputs=each.n_inputs, extra_columns=int(each.name == "naval"))
    problem = TASKS[f"uci-{each.name}"].problem(1)
    parts = [all_rows(part) for part in (problem.train, problem.validation, problem.test)]
    assert [tuple(x.shape) for x, _ in parts] == [(n, each.n_inputs) for n in (97, 11, 12)]
    assert problem.n_parameters == each.hidden * (each.n_inputs + 2) + 1
    for values in parts[0]:
        assert torch.allclose(values.mean(0), torch.zeros(values.shape[1], dtype=values.dtype), atol=1e-12)
        assert torch.allclose(values.std(0), torch.ones(values.shape[1], dtype=values.dtype), atol=1e-12)
    assert problem.ood == {}
    gaussian = problem.likelihood
    tested = np.loadtxt(folder / each.folder / "index_test_1.txt").astype(int)
    targets = gaussian.target_shift + gaussian.target_scale * parts[2][1]
    assert targets.squeeze(-1).numpy() == pytest.approx(table[tested, each.n_inputs], rel=1e-12)


def test_both_protocols_have_the_same_rows_and_other_recipes(folder):
    write_uci(folder, "protein-tertiary-structure", inputs=9)
    short, long = (TASKS[f"uci-protein{variant}"].problem(0) for variant in ("", "-400"))
    assert row_set(all_rows(short.train)[0]) == row_set(all_rows(long.train)[0])
    assert (short.recipe.epochs, long.recipe.epochs) == (20, 200)
    assert {short.recipe.schedule, long.recipe.schedule} == {"constant"}


def test_repeated_rows_are_kept_in_published_splits_and_dropped_in_gap_splits(folder):
    write_uci(folder, "concrete", inputs=8, repeats=7)
    for name, expected in (("uci-concrete", 127), ("uci-concrete-gap", 120)):
        problem = TASKS[name].problem(0)
        loaders = (problem.train, problem.validation, problem.test, *problem.ood.values())
        assert sum(len(all_rows(part)[0]) for part in loaders) == expected


def test_a_seed_without_a_published_split_is_rejected(folder):
    write_uci(folder, "yacht", inputs=6)
    with pytest.raises(OptionError, match="below 20"):
        TASKS["uci-yacht"].problem(20)


@pytest.mark.parametrize("seed", [0, 7])
def test_the_gap_of_a_set_is_the_middle_third_of_the_column_that_the_seed_names(folder, seed):
    write_uci(folder, "energy", inputs=8)
    problem = TASKS["uci-energy-gap"].problem(seed)
    gap, _ = all_rows(problem.ood["gap"])
    outer = torch.cat([all_rows(part)[0] for part in (problem.train, problem.validation, problem.test)])[:, seed]
    assert ((outer < gap[:, seed].min()) | (outer > gap[:, seed].max())).all()
    assert (len(gap), len(outer)) == (40, 80)


def test_a_network_learns_a_small_table(folder):
    write_uci(folder, "yacht", inputs=6)
    problem = TASKS["uci-yacht"].problem(0)
    _, after = train(problem, epochs=100)
    x, y = all_rows(problem.test)
    assert (problem.model(x) - y).square().mean().sqrt().item() < 0.5
    assert np.isfinite(after)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("data", "a b\n"),
        ("data", ""),
        ("data", "1 2 3 4 5 6 nan\n"),
        ("index_target", "7\n"),
        ("index_train_0", "0 1 200\n"),
        ("index_train_0", "0\n0\n1\n"),
        ("index_test_0", "0\n"),
    ],
)
def test_a_file_of_a_set_that_is_damaged_is_named(folder, file, text):
    write_uci(folder, "yacht", inputs=6)
    (folder / "yacht" / f"{file}.txt").write_text(text)
    with pytest.raises(DataError, match=rf"{file}\.txt"):
        TASKS["uci-yacht"].problem(0)


@pytest.mark.parametrize("name", DOWNLOADED)
def test_without_files_and_network_the_files_are_named_and_nothing_is_left(folder, name):
    with pytest.raises(MissingDataError) as caught:
        TASKS[name].problem(0)
    message = str(caught.value)
    assert str(folder) in message
    assert any(file in message for file in ("ubyte", "data_batch_1", "data.txt"))
    assert "BDL_BENCH_DATA" in message
    assert "no network in tests" in message
    assert [path.name for path in folder.iterdir() if path.suffix != ".lock"] == []


def test_a_file_of_a_set_is_downloaded_once_if_it_has_the_checksum(folder, monkeypatch):
    write_uci(folder, "power-plant", inputs=4)
    served, asked = (folder / "power-plant").rename(folder / "served"), []

    def serve(self, url, output_file, _):  # noqa: ARG001
        asked.append(url)
        Path(output_file).write_bytes((served / url.rpartition("/")[2]).read_bytes())

    monkeypatch.setattr("pooch.HTTPDownloader.__call__", serve)
    with pytest.raises(MissingDataError, match="hash"):
        TASKS["uci-power"].problem(0)
    assert not (folder / "power-plant" / "data.txt").exists()
    monkeypatch.setattr(uci, "_checksums", dict)
    digests = [problem_digest(TASKS["uci-power"].problem(0)) for _ in range(2)]
    assert len(set(asked)) == 5
    assert all("/UCI_Datasets/power-plant/data/" in url for url in asked)
    assert digests[0] == digests[1]
    assert (folder / "power-plant" / "data.txt").read_bytes() == (served / "data.txt").read_bytes()


SHARED = Path(__file__).parents[3].parent / "shared" / "uci"


@pytest.mark.skipif(not (SHARED / "yacht").is_dir(), reason="needs the UCI sets in ../shared/uci")
@pytest.mark.parametrize("each", UCI_SETS, ids=lambda each: each.name)
def test_the_sets_on_disk_are_those_of_the_checksums(each, monkeypatch):
    import hashlib

    monkeypatch.setenv("BDL_BENCH_DATA", str(SHARED))
    split = uci.canonical_split(each.folder, each.n_splits - 1)
    assert split.columns.inputs.shape[1] == each.n_inputs
    assert uci.n_splits(each.folder) == each.n_splits
    assert len(split.test) == pytest.approx(0.1 * len(split.columns.target), abs=1)
    path = f"{each.folder}/index_train_{each.n_splits - 1}.txt"
    assert uci._checksums()[path] == f"md5:{hashlib.md5((SHARED / path).read_bytes()).hexdigest()}"
