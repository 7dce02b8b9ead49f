"""Rows are paired by their identity: loaders that shuffle give the records of loaders that do not."""

import numpy as np
import pytest
import torch
from brief_refits import with_brief_refits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bdl_bench.metrics import agreement, evaluate
from bdl_bench.problem import Problem
from bdl_bench.problem.kept_rows import AS_GIVEN, DATASET_ORDER, SORTED, Budget, CheckedRows, kept_rows
from bdl_bench.problem.row_identity import ids_of, matching_order
from bdl_bench.records import RecordStore
from bdl_bench.report import write_report
from bdl_bench.report.results import group_by_task, load_records
from bdl_bench.runner.grid import Grid
from bdl_bench.tasks import TASKS
from bdl_bench.tasks.registry import Task
from estimators.errors import DataError, NonDeterministicError
from estimators.persistence.checksums import row_hashes
from estimators.training import Recipe

N = 40
METHODS = ["map", "laplace-kron", "regvar", "regvar-finetune", "dropout"]
BY_ORDER = ["map", "regvar-finetune", "dropout"]  # the last two depend on the order of the training rows
GENERATOR = np.random.default_rng(7)


class Shuffling:
    """A loader of the user's own, with a random state that no seed reaches, in batches of another order each time."""

    def __init__(self, x, y, size):
        self.x, self.y, self.size = x, y, size

    def __iter__(self):
        for index in torch.from_numpy(GENERATOR.permutation(len(self.x))).split(self.size):
            yield (self.x[index], self.y[index]) if self.y is not None else self.x[index]


def ordered(x, y, size):
    return list(zip(x.split(size), y.split(size), strict=True)) if y is not None else list(x.split(size))


def torch_shuffling(x, y, size):
    return DataLoader(TensorDataset(x, y), size, shuffle=True)


def with_generator(x, y, size):
    return DataLoader(TensorDataset(x, y), size, shuffle=True, generator=torch.Generator().manual_seed(3))


def make(loader, seed):
    """Three classes; 13 does not divide N; every set by the same kind of loader."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * N, 3, generator=g, dtype=torch.float64)
    y = (x @ torch.randn(3, 3, generator=g, dtype=torch.float64)).argmax(-1)
    parts = [(x[i * N : (i + 1) * N], y[i * N : (i + 1) * N]) for i in range(4)]
    train, validation, test, shifted = (loader(*part, 13) for part in parts)
    far = loader(3 * parts[3][0], parts[3][1], 13)
    network = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 3)).double()
    return Problem(
        network, "classification", train, validation, test, prior_precision=0.7, recipe=Recipe(epochs=5),
        ood={"far": far}, shifts={"noise-1": shifted},
    )  # fmt: skip


def results_of(loader, methods, directory):
    """The results of a grid over the problem with this kind of loader."""
    task = Task("classes", "three classes", lambda seed: make(loader, seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "classes", task)
        with_brief_refits(patch)
        grid = Grid(["classes"], methods, [0], directory, tune_budget=2)
        assert {r.status for r in grid.run(lambda _: None)} == {"ok"}
    store = RecordStore(directory)
    (results,) = group_by_task(store, load_records(store))
    return results


@pytest.fixture
def records(tmp_path):
    """records(name, kind of loader, methods) -> the results of the grid."""
    return lambda name, loader, methods=METHODS: results_of(loader, methods, tmp_path / name)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The results of loaders without shuffling; tests only read them."""
    return results_of(ordered, METHODS, tmp_path_factory.mktemp("ordered"))


def sorted_rows(arrays):
    """Every array of a record, each set sorted by the identity of its rows."""
    found = {}
    for name, array in arrays.items():
        group = name.removeprefix("tuned/").rpartition("/")[0]
        ids = arrays[f"{group}/row_id" if group else "row_id"]
        found[name] = array[np.argsort(ids, kind="stable")]
    return found


def assert_same_records(found, expected):
    for method in found.finished:
        here, there = (results.finished[method][0] for results in (found, expected))
        assert here.metrics == pytest.approx(there.metrics, rel=1e-9, nan_ok=True), method
        assert here.tuned == pytest.approx(there.tuned, rel=1e-6, nan_ok=True), method
        mine, theirs = (sorted_rows(results.store.arrays(results.finished[method][0])) for results in (found, expected))
        assert mine.keys() == theirs.keys()
        for name, array in mine.items():
            assert array == pytest.approx(theirs[name], rel=1e-7, abs=1e-12), (method, name)


@pytest.mark.parametrize(("loader", "methods"), [(torch_shuffling, METHODS), (with_generator, BY_ORDER)])
def test_loaders_of_torch_that_shuffle_give_the_records_of_ordered_ones(loader, methods, records, expected):
    found = records("shuffled", loader, methods)
    assert_same_records(found, expected)
    assert found.finished["map"][0].configuration["row_order"].count(DATASET_ORDER) == 5
    assert expected.finished["map"][0].configuration["row_order"] == AS_GIVEN


def held_out_shuffled(x, y, size, calls=[]):  # noqa: B006
    """The first loader of a problem, that of the training rows, is ordered; the others shuffle."""
    calls.append(1)
    return ordered(x, y, size) if len(calls) % 5 == 1 else Shuffling(x, y, size)


def test_held_out_sets_of_a_loader_of_ones_own_give_the_records_of_ordered_ones(records, expected):
    found = records("own", held_out_shuffled, BY_ORDER)
    assert_same_records(found, expected)
    assert found.finished["map"][0].configuration["row_order"].count(SORTED) == 4


def test_what_depends_on_the_order_of_training_rows_is_the_same_on_every_run_of_a_loader_of_ones_own(records):
    first, second = (records(name, Shuffling, BY_ORDER) for name in ("first", "second"))
    assert_same_records(first, second)
    assert f"train: {SORTED}" in first.finished["map"][0].configuration["row_order"]


def test_a_method_that_does_not_depend_on_the_order_is_the_same_for_a_training_loader_of_ones_own(
    tmp_path, monkeypatch
):
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().eval()
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2 * N + 9, n, generator=g, dtype=torch.float64) for n in (3, 2))
    train, validation, test = slice(N), slice(N, 2 * N), slice(2 * N, None)

    def trained(loader):
        held_out = ordered(x[validation], y[validation], 13), ordered(x[test], y[test], 4)
        return Problem(network, "regression", loader(x[train], y[train], 13), *held_out, prior_precision=0.7)

    found = {}
    for name, loader in (("ordered", ordered), ("own", Shuffling)):
        monkeypatch.setitem(TASKS, "numbers", Task("numbers", "", lambda seed: trained(loader)))  # noqa: B023, ARG005
        runs = Grid(
            ["numbers"], ["laplace", "last-layer-laplace", "laplace-kron", "regvar-pointwise"], [0], tmp_path / name
        )
        found[name] = runs.run(lambda _: None)
    for here, there in zip(found["own"], found["ordered"], strict=True):
        assert here.metrics == pytest.approx(there.metrics, rel=1e-8)
        assert "train: sorted by row digest" in here.configuration["row_order"]
        assert there.configuration["row_order"] == AS_GIVEN


def test_records_written_in_another_order_agree_exactly(records):
    results = records("own", Shuffling, ["laplace", "regvar-pointwise"])
    store, record = results.store, results.finished["regvar-pointwise"][0]
    arrays = store.arrays(record)
    order = np.random.default_rng(0).permutation(N)
    moved = {k: v[order] if k.removeprefix("tuned/").rpartition("/")[0] == "" else v for k, v in arrays.items()}
    store.write(record, moved)
    (results,) = group_by_task(store, load_records(store))
    variances = [results.arrays(m, 0)["epistemic_variance"] for m in ("regvar-pointwise", "laplace")]
    assert agreement(*variances).spearman == pytest.approx(1.0, abs=1e-6)
    assert agreement(*variances).relative_rmse < 1e-4
    assert evaluate("classification", dict(results.predictions("laplace", 0).for_metrics())) == pytest.approx(
        results.finished["laplace"][0].metrics, rel=1e-12
    )
    write_report(store.directory)


def test_records_of_other_rows_are_not_compared(records):
    results = records("ordered", ordered, ["map", "laplace"])
    store, record = results.store, results.finished["map"][0]
    arrays = store.arrays(record)
    arrays["row_id"] = arrays["row_id"] + np.uint64(1)
    store.write(record, arrays)
    found = {r.method: (r.status, r.reason) for r in load_records(store)}
    assert found["map"][0] == "ok"
    assert found["laplace"][0] == "failed"
    assert f"{N} of {N} rows have no counterpart" in found["laplace"][1]


def test_records_without_identities_are_compared_only_if_their_targets_are_equal(write_record, tmp_path):
    write_record("task", "laplace", 0)
    record = write_record("task", "map", 0)
    store = RecordStore(tmp_path)
    assert {r.status for r in load_records(store)} == {"ok"}
    arrays = store.arrays(record)
    store.write(record, {name: array[::-1] for name, array in arrays.items()})
    assert [(r.method, r.status) for r in load_records(store)] == [("laplace", "failed"), ("map", "ok")]


def test_a_held_out_loader_with_other_rows_on_every_pass_is_named(monkeypatch, tmp_path):
    def make_dropping(seed):
        problem = make(ordered, seed)
        x, y = torch.randn(10, 3, dtype=torch.float64), torch.zeros(10, dtype=torch.long)
        problem.shifts["noise-2"] = DataLoader(TensorDataset(x, y), 3, shuffle=True, drop_last=True)
        return problem

    monkeypatch.setitem(TASKS, "dropping", Task("dropping", "", make_dropping))
    (record,) = Grid(["dropping"], ["map"], [0], tmp_path).run(lambda _: None)
    assert record.status == "failed"
    assert record.reason.startswith("NonDeterministicError")
    assert "shift/noise-2 loader" in record.reason


def test_rows_that_differ_between_two_calls_of_a_factory_are_named(monkeypatch, tmp_path):
    def make_drawn(seed):
        problem = make(ordered, seed)
        problem.validation[0][0][:] = torch.from_numpy(GENERATOR.normal(size=(13, 3)))
        return problem

    monkeypatch.setitem(TASKS, "drawn", Task("drawn", "", make_drawn))
    (record,) = Grid(["drawn"], ["map"], [0], tmp_path).run(lambda _: None)
    assert record.status == "failed"
    assert "other rows than before in: validation" in record.reason


def test_rows_that_are_too_many_to_keep_must_come_in_one_order():
    x, y = torch.randn(20, 2), torch.randint(3, (20,))
    kept = kept_rows("test", Shuffling(x, y, 6), Budget(bytes_left=10))
    assert isinstance(kept, CheckedRows)
    with pytest.raises(NonDeterministicError, match="test loader with the same rows in the same order"):
        list(kept)
    again = kept_rows("test", DataLoader(TensorDataset(x, y), 6, shuffle=True), Budget(bytes_left=10))
    assert torch.equal(torch.cat([item[0] for item in again]), x)
    assert torch.equal(torch.cat([item[0] for item in again]), x)


def test_a_loader_that_uses_its_buffer_again_is_copied():
    buffer = torch.zeros(2, 3)

    class Reusing:
        def __iter__(self):
            for value in range(3):
                yield buffer.fill_(value), torch.full((2,), value)

    kept = kept_rows("test", Reusing(), Budget())
    assert sorted(torch.cat([x[:, 0] for x, _ in kept]).tolist()) == [0, 0, 1, 1, 2, 2]
    assert all((x[:, 0] == y).all() for x, y in kept)


def test_rows_of_different_lengths_keep_their_batches():
    g = torch.Generator().manual_seed(0)
    batches = [({"ids": torch.randint(9, (2, n), generator=g)}, torch.tensor([0, 1])) for n in (3, 5, 4)]
    kept = kept_rows("test", batches, Budget())
    assert [x["ids"].shape for x, _ in kept] == [(2, 3), (2, 5), (2, 4)]


def test_the_identity_of_a_row_has_its_inputs_its_target_and_what_its_batch_shares():
    x, y = {"a": torch.arange(6.0).reshape(3, 2), "time": torch.tensor(0.5), "scale": 2}, torch.tensor([0, 1, 1])
    base = row_hashes(x, y)
    assert len(set(base)) == 3
    again = row_hashes({**x, "a": x["a"][[2, 0, 1]]}, y[[2, 0, 1]])
    assert again == [base[2], base[0], base[1]]
    assert not set(base) & set(row_hashes({**x, "time": torch.tensor(0.6)}, y))
    assert not set(base) & set(row_hashes({**x, "scale": 3}, y))
    assert row_hashes(x, torch.tensor([0, 1, 2]))[:2] == base[:2]
    assert row_hashes(x, None)[0] != base[0]


def test_rows_are_regrouped_with_what_they_share_and_a_batch_of_one_row_changes_no_identity():
    x, y = torch.arange(14.0).reshape(7, 2), torch.arange(7)
    positions = torch.arange(2)[None]

    def batches(order, size):
        return [({"x": x[i], "positions": positions, "kind": "a"}, y[i]) for i in torch.tensor(order).split(size)]

    first = kept_rows("test", batches([0, 1, 2, 3, 4, 5, 6], 3), Budget())
    second = kept_rows("test", batches([6, 2, 0, 4, 1, 3, 5], 3), Budget())
    assert first.digests == second.digests
    assert [len(targets) for _, targets in first] == [3, 3, 1]
    for (here, targets), (there, others) in zip(first, second, strict=True):
        assert torch.equal(here["x"], there["x"])
        assert torch.equal(targets, others)
        assert torch.equal(here["positions"], positions)
        assert torch.equal(here["x"][:, 0], 2.0 * targets)
    arrays = torch.cat([targets for _, targets in first])[torch.from_numpy(first.loader_order)]
    assert torch.equal(arrays, y)


def test_equal_rows_match_in_any_order_and_other_rows_do_not():
    ids = ids_of([bytes([i]) * 32 for i in (3, 1, 1, 2)])
    order = matching_order(ids[[1, 0, 3, 2]], ids)
    assert np.array_equal(ids[[1, 0, 3, 2]][order], ids)
    assert matching_order(ids, ids[:3]) is None
    assert matching_order(ids, ids[[0, 0, 1, 3]]) is None


@pytest.mark.parametrize("name", ["validation", "test", "ood/far", "shift/noise-1"])
def test_bad_rows_are_named_by_loader_batch_and_row(name, monkeypatch, tmp_path):
    def make_bad(seed):
        problem = make(ordered, seed)
        problem.sets()[name][2][0 if isinstance(problem.sets()[name][2], tuple) else ...][3, 1] = torch.nan
        return problem

    monkeypatch.setitem(TASKS, "bad", Task("bad", "", make_bad))
    (record,) = Grid(["bad"], ["last-layer-laplace"], [0], tmp_path).run(lambda _: None)
    assert record.status == "failed"
    assert f"{name} loader, batch 2, row 3" in record.reason


def test_a_batch_that_is_none_is_named():
    with pytest.raises(DataError, match="ood/far loader, batch 1"):
        kept_rows("ood/far", [torch.zeros(2, 3), "no batch"], Budget())
