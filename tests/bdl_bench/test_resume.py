"""A run that is killed goes on where it was; several runs into one directory share the work: nothing is done twice."""

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from fork_server import call

import bdl_bench.runner.warm_up  # noqa: F401
from bdl_bench.records import RecordStore
from bdl_bench.runner.grid import Grid
from estimators.persistence import atomic

MODULE = '''
import torch
from torch import nn
from bdl_bench import Problem
from estimators.training import Recipe

def make(seed):
    """A small classification problem, the same for the same seed."""
    g = torch.Generator().manual_seed(seed + 40)
    x, y = torch.randn(60, 4, generator=g).double(), torch.randint(0, 3, (60,), generator=g)
    batches = list(zip(x.split(17), y.split(17)))
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return Problem(model, "classification", batches, batches[:1], batches[:2], prior_precision=0.7,
                   recipe=Recipe(epochs=10))
'''
METHODS = ["map", "last-layer-laplace", "laplace", "regvar"]


def run_grid(directory, seeds, die_at_write):
    """Run by a process of its own; `die_at_write` is the number of the write to be killed in, 0 for none."""
    if die_at_write:
        killed_in_write(die_at_write)
    Grid(["small_problem:make"], METHODS, list(range(seeds)), Path(directory)).run(lambda _: None)


def killed_in_write(number):
    """The file is written, and not yet under its name."""
    replace, n_calls = os.replace, []

    def replacing(*args):
        n_calls.append(args)
        if len(n_calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*args)

    atomic.os.replace = replacing


@pytest.fixture
def make_run(tmp_path):
    """make_run(name of a directory, ...) -> a call that runs the grid into it."""
    (tmp_path / "small_problem.py").write_text(MODULE)

    def make(name, *, seeds=2, die_at_write=0):
        return call(run_grid, str(tmp_path / name), seeds, die_at_write, cwd=str(tmp_path))

    return make


def marks(directory):
    """Inode and time of every complete record, of its arrays, and of the networks: a file made anew has others."""
    store = RecordStore(directory)
    paths = [directory / record.arrays for record in store.all() if record.status == "ok"]
    paths += [store.path(r.task, r.method, r.seed) for r in store.all()] + list(directory.rglob("*.safetensors"))
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def results(directory):
    """What does not depend on time: metrics, configuration, reports of the fits, and all arrays."""
    store = RecordStore(directory)
    found = {}
    for record in store.all():
        plain = record.model_dump(include={"key", "status", "metrics", "configuration"})
        found[record.task, record.method, record.seed] = json.dumps(plain), store.arrays(record)
    return found


def assert_same(here, there):
    assert here.keys() == there.keys()
    for cell, (plain, arrays) in here.items():
        assert plain == there[cell][0]
        assert arrays.keys() == there[cell][1].keys() != set()
        for name, array in arrays.items():
            assert np.array_equal(array, there[cell][1][name], equal_nan=True), (cell, name)


def parts(directory):
    return [path for path in directory.rglob("*.part") if "locks" not in path.parts]


def killed(fork_server, run, delay):
    """Whether the run was killed after so many seconds; False where it had ended before."""
    (pid,) = fork_server.start(run)
    time.sleep(delay)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return fork_server.wait() == [-signal.SIGKILL]


@pytest.mark.parametrize("kills", [4, pytest.param(10, marks=pytest.mark.verification)])
def test_killed_at_random_it_ends_as_if_undisturbed_and_does_nothing_twice(kills, fork_server, make_run, tmp_path):
    start = time.monotonic()
    fork_server.start(make_run("undisturbed"))
    assert fork_server.wait() == [0]
    longest, delays = (time.monotonic() - start) / 5, random.Random()
    n_kills, n_ended, seen = 0, 0, {}
    while n_kills < kills:
        directory = tmp_path / f"killed-{n_ended}"
        if killed(fork_server, make_run(directory.name), delays.uniform(0, longest)):
            n_kills += 1
        else:
            n_ended += 1
        now = marks(directory)
        assert now.items() >= seen.get(directory, {}.items())
        seen[directory] = now.items()
    fork_server.start(make_run(directory.name))
    assert fork_server.wait() == [0]
    for directory, before in seen.items():
        assert marks(directory).items() >= before
        assert_same(results(directory), results(tmp_path / "undisturbed"))
        assert not parts(directory)


@pytest.mark.parametrize("die_at_write", [1, 2, 3], ids=["network", "arrays", "record"])
def test_what_a_killed_writer_left_is_no_result_and_is_removed(die_at_write, fork_server, make_run, tmp_path):
    fork_server.start(make_run("killed", seeds=1, die_at_write=die_at_write))
    assert fork_server.wait() == [-signal.SIGKILL]
    assert len(parts(tmp_path / "killed")) == 1
    assert RecordStore(tmp_path / "killed").all() == []
    fork_server.start(make_run("killed", seeds=1))
    assert fork_server.wait() == [0]
    assert not parts(tmp_path / "killed")
    assert [r.status for r in RecordStore(tmp_path / "killed").all()] == ["ok"] * len(METHODS)


def test_three_runs_at_a_time_into_one_directory_do_nothing_twice(fork_server, make_run, tmp_path):
    fork_server.start(make_run("alone"))
    assert fork_server.wait() == [0]
    run = make_run("shared")
    fork_server.start(run, run, run)
    seen = {}
    while True:
        now = marks(tmp_path / "shared") if (tmp_path / "shared").exists() else {}
        assert now.items() >= seen.items()
        seen = now
        if len(RecordStore(tmp_path / "shared").all()) == 2 * len(METHODS):
            break
        time.sleep(0.02)
    assert fork_server.wait() == [0, 0, 0]
    assert marks(tmp_path / "shared").items() >= seen.items()
    assert_same(results(tmp_path / "shared"), results(tmp_path / "alone"))
