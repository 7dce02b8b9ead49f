"""A limit of seconds for a cell: what needs more is ended and skipped, and is not tried again with as little."""

import sys
import time
from dataclasses import replace

import pytest
from work_items import end

from bdl_bench.methods import METHODS
from bdl_bench.records import RecordStore
from bdl_bench.report import write_report
from bdl_bench.runner.executors import TimeLimitError, Workers, check_workers, executor_for
from bdl_bench.runner.grid import Grid
from estimators.errors import OptionError


def seconds_of(item):
    """Half a second for those that would sleep for ever, and as long as they need for the others."""
    return 0.5 if item == "sleep 600" else None


def test_what_needs_longer_is_ended_with_its_process_and_the_others_run():
    told = []
    with executor_for(Workers(2, executor="local")) as executor:
        words = ["sleep 600", "sleep 1", "raise", "fine"]
        start = time.monotonic()
        outcomes = dict(executor.run(end, iter(words), started=told.append, timeout=seconds_of))
    assert time.monotonic() - start < 300
    assert sorted(told) == sorted(words)
    assert isinstance(outcomes["sleep 600"], TimeLimitError)
    assert outcomes["sleep 600"].seconds == 0.5
    assert isinstance(outcomes["raise"], ValueError)
    assert isinstance(outcomes["sleep 1"], int)
    assert isinstance(outcomes["fine"], int)


def test_what_ends_in_time_has_its_result():
    with executor_for(Workers(1, timeout=60.0)) as executor:
        outcomes = dict(executor.run(end, iter(["sleep .2", "fine"]), started=print, timeout=lambda item: 60.0))  # noqa: ARG005
    assert outcomes["fine"] == outcomes["sleep .2"]  # the same process: none was ended


def test_a_limit_needs_processes_that_can_be_ended():
    assert Workers(timeout=5.0).name == "local"
    assert Workers(timeout=5.0).exclusive
    with pytest.raises(OptionError, match="--executor local"):
        check_workers(Workers(timeout=5.0, executor="in-process"))
    for limit in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(OptionError, match="seconds above 0"):
            check_workers(Workers(timeout=limit))


MODULE = """
import time
import torch
from bdl_bench import Problem
from bdl_bench.methods import METHODS, Method

def slow(problem, seed):
    time.sleep(600 if (FOLDER / "slow").exists() else 0)
    return METHODS["map"].build(problem, seed)

METHODS["slow"] = Method("slow", "takes its time", slow)

def make(seed):
    '''A trained network.'''
    g = torch.Generator().manual_seed(seed)
    rows = [(torch.randn(9, 2, generator=g).double(), torch.randn(9, 2, generator=g).double())]
    return Problem(torch.nn.Linear(2, 2).double().eval(), "regression", rows, rows, rows, prior_precision=2.0)
"""


LIMIT = 20.0
"""Seconds: many times what a run of MAP takes with its imports, also on a machine that is busy with other work."""


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """Three seeds of a method that sleeps as long as there is a file `slow`, and of MAP."""
    head = f"from pathlib import Path\nFOLDER = Path({str(tmp_path)!r})\n"
    (tmp_path / "slow_problem.py").write_text(head + MODULE)
    (tmp_path / "slow").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Grid(
        ["slow_problem:make"],
        ["slow", "map"],
        [0, 1, 2],
        tmp_path / "run",
        workers=Workers(timeout=LIMIT),
        tune_budget=0,
    )
    METHODS.pop("slow", None)
    sys.modules.pop("slow_problem", None)


def run_out_of_time(grid):
    """Run MAP without a limit and then everything with one of two seconds, which only the slow method has to keep."""
    run(replace(grid, methods=["map"], workers=Workers()))
    records, started = run(replace(grid, workers=Workers(timeout=2.0)))
    assert started == [("slow", 0)]
    assert [records["slow", seed].status for seed in (0, 1, 2)] == ["skipped"] * 3
    return records


def run(grid):
    """The record of each cell, and which were started."""
    events = []
    records = grid.run(events.append)
    started = [(e.method, e.seed) for e in events if e.status == "started" and e.method]
    return {(r.method, r.seed): r for r in records}, started


def test_a_cell_out_of_time_is_skipped_and_its_other_seeds_are_not_tried(grid):
    records, started = run(grid)
    assert [records["map", seed].status for seed in (0, 1, 2)] == ["ok"] * 3
    assert [records["slow", seed].status for seed in (0, 1, 2)] == ["skipped"] * 3
    assert started == [("slow", 0), ("map", 0), ("map", 1), ("map", 2)]
    assert f"within the timeout of {LIMIT:g} s" in records["slow", 0].reason
    assert "still at work" in records["slow", 0].reason
    assert "seed 0 did not" in records["slow", 2].reason
    assert f"within the timeout of {LIMIT:g} s" in write_report(grid.directory).read_text()


def test_a_later_run_tries_again_only_with_more_time(grid, tmp_path):
    first = run_out_of_time(grid)
    for less in (2.0, 1.0):
        again, started = run(replace(grid, workers=Workers(timeout=less)))
        assert started == []
        assert again == first
    (tmp_path / "slow").unlink()
    records, started = run(replace(grid, workers=Workers(timeout=300.0)))
    assert started == [("slow", 0), ("slow", 1), ("slow", 2)]
    assert {r.status for r in records.values()} == {"ok"}
    assert [r.timeout for r in RecordStore(grid.directory).all()] == [None] * 6


def test_a_run_without_a_limit_tries_what_had_too_little_time(grid, tmp_path):
    run_out_of_time(grid)
    (tmp_path / "slow").unlink()
    records, started = run(replace(grid, workers=Workers()))
    assert started == [("slow", 0), ("slow", 1), ("slow", 2)]
    assert {r.status for r in records.values()} == {"ok"}
