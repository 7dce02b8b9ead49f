"""Processes of this machine: several at a time, and one that dies takes nothing but its own item with it."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from work_items import end, meet, pid_or_stay, stay_in_a_worker

from bdl_bench.methods import METHODS
from bdl_bench.records import RecordStore
from bdl_bench.runner.executors import JobQueue, WorkerCrashedError, Workers, executor_for
from bdl_bench.runner.executors.local import new_processes
from bdl_bench.runner.grid import Grid


def run(work, items, workers, started=lambda item: None):  # noqa: ARG005
    with executor_for(workers) as executor:
        return dict(executor.run(work, JobQueue(iter(items), started)))


def run_in_order(work, items):
    with executor_for(Workers(1, executor="local")) as executor:
        return list(executor.run(work, JobQueue(iter(items), lambda item: None)))  # noqa: ARG005


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_two_run_at_a_time_and_each_is_told_when_it_starts(tmp_path):
    here, there = str(tmp_path / "a"), str(tmp_path / "b")
    told = []
    outcomes = run(meet, [(here, there), (there, here)], Workers(2), started=told.append)
    assert outcomes == {(here, there): "b", (there, here): "a"}
    assert sorted(told) == [(here, there), (there, here)]
    assert not multiprocessing.active_children()


def test_what_kills_its_process_twice_has_failed_and_all_others_run(tmp_path):
    lucky = f"once {tmp_path / 'mark'}"
    words = ["first", f"signal {signal.SIGKILL:d}", "raise", lucky, "exit 0", "last"]
    told = []
    outcomes = run(end, words, Workers(1, executor="local"), started=told.append)
    assert outcomes.keys() == set(words)
    assert isinstance(outcomes["raise"], ValueError)
    assert isinstance(outcomes[words[1]], WorkerCrashedError)
    assert "SIGKILL" in str(outcomes[words[1]])
    assert "exit status 0" in str(outcomes["exit 0"])
    # the three whose process ended wait for the others, then run alone, each in a process of its own
    assert told == [*words, words[1], lucky, "exit 0"]
    assert len({os.getpid(), outcomes["first"], outcomes[lucky]}) == 3


def test_leaving_early_ends_the_processes(tmp_path):
    path = tmp_path / "pid"
    with executor_for(Workers(1, executor="local")) as executor:
        items = iter(["fine", str(path)])
        running = executor.run(pid_or_stay, JobQueue(items, lambda item: None))  # noqa: ARG005
        next(running)
        running.close()
    assert not multiprocessing.active_children()


def test_processes_leave_with_the_one_that_started_them(tmp_path):
    path = tmp_path / "pid"
    context = new_processes()
    parent = context.Process(target=stay_in_a_worker, args=(str(path),))
    parent.start()
    while not (path.exists() and path.read_text()):
        assert parent.is_alive()
        time.sleep(0.05)
    pid = int(path.read_text())
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 20
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid)


def test_a_job_that_cannot_be_pickled_has_failed_and_the_next_one_runs():
    odd = threading.Lock()
    outcomes = [outcome for _, outcome in run_in_order(end, [odd, "fine"])]
    assert isinstance(outcomes[0], TypeError)
    assert isinstance(outcomes[1], int)


def test_where_no_process_can_start_the_run_ends_with_the_reason(monkeypatch):
    monkeypatch.setattr("bdl_bench.runner.executors.local._set_up", _Unloadable())
    with pytest.raises(WorkerCrashedError, match="__main__"):
        run(end, ["fine"], Workers(1, executor="local"))


class _Unloadable:
    """A target that the new process cannot make."""

    def __reduce__(self):
        return os._exit, (7,)


MODULE = '''
import os, signal
import torch
from bdl_bench import Problem
from bdl_bench.methods import METHODS, Method

def die(problem, seed):
    os.kill(os.getpid(), signal.SIGKILL)

METHODS["deadly"] = Method("deadly", "kills the process that it runs in", die)

def make(seed):
    """A trained network."""
    g = torch.Generator().manual_seed(seed)
    rows = [(torch.randn(9, 2, generator=g).double(), torch.randn(9, 2, generator=g).double())]
    return Problem(torch.nn.Linear(2, 2).double().eval(), "regression", rows, rows, rows, prior_precision=2.0)
'''


def test_a_method_that_kills_its_process_has_failed_and_the_run_goes_on(tmp_path, monkeypatch):
    (tmp_path / "deadly_problem.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    grid = Grid(["deadly_problem:make"], ["deadly", "map"], [0], tmp_path, workers=Workers(1, executor="local"))
    try:
        deadly, other = grid.run(print)
    finally:
        METHODS.pop("deadly", None)
    assert (deadly.status, other.status) == ("failed", "ok")
    assert "WorkerCrashedError" in deadly.reason
    assert "probably out of memory" in deadly.reason
    assert [r.status for r in RecordStore(tmp_path).all()] == ["failed", "ok"]
