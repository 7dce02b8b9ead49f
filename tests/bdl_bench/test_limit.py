"""A timeout for an evaluation job: one that needs more is ended, skipped, and not tried again with as little."""

import sys
import time
from dataclasses import replace

import pytest
from stub_executor import StubExecutor
from work_items import end

from bdl_bench.methods import METHODS
from bdl_bench.records import RecordStore
from bdl_bench.report import write_report
from bdl_bench.runner.executors import JobQueue, TimeLimitError, Workers, check_workers, executor_for
from bdl_bench.runner.grid import Grid
from bdl_bench.runner.train_job import TrainingJob
from estimators.errors import OptionError


def seconds_of(job):
    """Half a second for jobs that sleep ten minutes, no timeout for the others."""
    return 0.5 if job == "sleep 600" else None


def test_a_job_that_reaches_its_timeout_is_ended_and_the_others_run():
    started = []
    with executor_for(Workers(2, executor="local")) as executor:
        words = ["sleep 600", "sleep .6", "raise", "fine"]
        start = time.monotonic()
        outcomes = dict(executor.run(end, JobQueue(iter(words), started.append, seconds_of)))
    assert time.monotonic() - start < 300
    assert sorted(started) == sorted(words)
    assert isinstance(outcomes["sleep 600"], TimeLimitError)
    assert outcomes["sleep 600"].seconds == 0.5
    assert isinstance(outcomes["raise"], ValueError)
    assert isinstance(outcomes["sleep .6"], int)
    assert isinstance(outcomes["fine"], int)


def test_a_job_that_ends_in_time_has_its_result():
    with executor_for(Workers(1, timeout=60.0)) as executor:
        outcomes = dict(executor.run(end, JobQueue(iter(["sleep .2", "fine"]), print, lambda job: 60.0)))  # noqa: ARG005
    assert outcomes["fine"] == outcomes["sleep .2"]  # the same process: none was ended


def test_a_timeout_needs_processes_that_can_be_ended():
    assert Workers(timeout=5.0).name == "local"
    assert Workers(timeout=5.0).exclusive
    with pytest.raises(OptionError, match="--executor local"):
        check_workers(Workers(timeout=5.0, executor="in-process"))
    for timeout in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(OptionError, match="seconds above 0"):
            check_workers(Workers(timeout=timeout))


MODULE = """
import torch
from bdl_bench import Problem
from bdl_bench.methods import METHODS, Method

METHODS["slow"] = Method("slow", "takes its time", METHODS["map"].build)

def make(seed):
    '''A trained network.'''
    g = torch.Generator().manual_seed(seed)
    rows = [(torch.randn(9, 2, generator=g).double(), torch.randn(9, 2, generator=g).double())]
    return Problem(torch.nn.Linear(2, 2).double().eval(), "regression", rows, rows, rows, prior_precision=2.0)
"""
SECONDS = 2.0


@pytest.fixture
def executor(monkeypatch):
    """An executor without processes, for which the method `slow` needs ten minutes and everything else none."""
    stub = StubExecutor(lambda job: 600.0 if getattr(job, "method", None) == "slow" else 0.0)
    monkeypatch.setattr("bdl_bench.runner.grid.executor_for", lambda workers, *, device: stub)  # noqa: ARG005
    return stub


@pytest.fixture
def grid(tmp_path, monkeypatch, executor):  # noqa: ARG001
    """Three seeds of the slow method and of MAP."""
    (tmp_path / "slow_problem.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Grid(["slow_problem:make"], ["slow", "map"], [0, 1, 2], tmp_path / "run", workers=Workers(timeout=SECONDS))
    METHODS.pop("slow", None)
    sys.modules.pop("slow_problem", None)


def run(grid):
    """The record of each evaluation job, and which were started."""
    events = []
    records = grid.run(events.append)
    started = [(e.method, e.seed) for e in events if e.status == "started" and e.method]
    return {(r.method, r.seed): r for r in records}, started


def test_a_job_that_reaches_its_timeout_is_skipped_and_its_other_seeds_are_not_tried(grid, executor):
    records, started = run(grid)
    assert [records["map", seed].status for seed in (0, 1, 2)] == ["ok"] * 3
    assert [records["slow", seed].status for seed in (0, 1, 2)] == ["skipped"] * 3
    assert started == [("slow", 0), ("map", 0), ("map", 1), ("map", 2)]
    assert f"within the timeout of {SECONDS:g} s" in records["slow", 0].reason
    assert "still running" in records["slow", 0].reason
    assert "seed 0 did not" in records["slow", 2].reason
    assert f"within the timeout of {SECONDS:g} s" in write_report(grid.directory).read_text()
    assert {isinstance(job, TrainingJob): seconds for job, seconds in executor.timeouts} == {True: None, False: SECONDS}


def test_a_later_run_tries_again_only_with_more_time(grid, executor):
    first, _ = run(grid)
    for less in (SECONDS, SECONDS / 2):
        again, started = run(replace(grid, workers=Workers(timeout=less)))
        assert started == []
        assert again == first
    executor.seconds = lambda job: 3.0  # noqa: ARG005
    records, started = run(replace(grid, workers=Workers(timeout=300.0)))
    assert started == [("slow", 0), ("slow", 1), ("slow", 2)]
    assert {r.status for r in records.values()} == {"ok"}
    assert [r.timeout for r in RecordStore(grid.directory).all()] == [None] * 6


def test_a_run_without_a_timeout_tries_again_what_had_too_little_time(grid):
    run(grid)
    records, started = run(replace(grid, workers=Workers()))
    assert started == [("slow", 0), ("slow", 1), ("slow", 2)]
    assert {r.status for r in records.values()} == {"ok"}
