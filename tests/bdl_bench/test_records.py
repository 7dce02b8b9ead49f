"""Records: whole or absent, valid for one key, and named safely."""

import os

import numpy as np
import pytest

from bdl_bench.records import Record, RecordStore
from bdl_bench.records.record import content_key, slug
from estimators.persistence.atomic import write_bytes, write_text


def test_a_write_that_is_cut_short_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_text(path, "old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(path, b"new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_record_comes_back_as_it_was_written(write_record, tmp_path):
    record = write_record("task", "laplace", 2)
    store = RecordStore(tmp_path)
    assert store.valid("task", "laplace", 2, key="k") == record
    assert store.all() == [record]
    assert store.arrays(record)["mean"].shape == (60, 3)


def test_infinite_and_undefined_metrics_survive_the_round_trip(tmp_path):
    store = RecordStore(tmp_path)
    record = Record(
        key="k", task="t", task_summary="", method="m", method_summary="", seed=0, status="ok",
        metrics={"a": float("inf"), "b": float("nan")},
    )  # fmt: skip
    store.write(record, {"x": np.zeros(1)})
    found = store.all()[0].metrics
    assert found["a"] == np.inf
    assert np.isnan(found["b"])


def test_another_key_makes_a_record_invalid(write_record, tmp_path):
    write_record("task", "laplace", 0)
    assert RecordStore(tmp_path).valid("task", "laplace", 0, key="other") is None


@pytest.mark.parametrize("status", ["failed", "skipped"])
def test_an_unfinished_cell_is_to_be_run_again(write_record, tmp_path, status):
    write_record("task", "laplace", 0, status=status)
    assert RecordStore(tmp_path).valid("task", "laplace", 0, key="k") is None


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_damaged_arrays_make_a_record_invalid(write_record, tmp_path, damage):
    record = write_record("task", "laplace", 0)
    path = tmp_path / record.arrays
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-10])
    assert RecordStore(tmp_path).valid("task", "laplace", 0, key="k") is None


def test_a_truncated_record_is_not_read(write_record, tmp_path):
    write_record("task", "laplace", 0)
    path = RecordStore(tmp_path).path("task", "laplace", 0)
    path.write_text(path.read_text()[:50])
    assert RecordStore(tmp_path).all() == []


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", "", "mod:make", "x" * 300, "<b>", ".", "\0"])
def test_a_file_name_stays_in_its_folder(name, tmp_path):
    path = RecordStore(tmp_path).path(name, name, 0)
    assert path.resolve().is_relative_to(tmp_path.resolve())
    assert len(path.name) < 100


def test_names_that_look_alike_on_disk_stay_apart():
    assert len({slug(name) for name in ("a:b", "a/b", "a b", "a-b")}) == 4


def test_the_content_key_depends_on_every_part():
    assert content_key(a=1, b=2) == content_key(b=2, a=1)
    assert len({content_key(a=1, b=2), content_key(a=1, b=3), content_key(a=12, b=""), content_key(a="1", b=2)}) == 4
