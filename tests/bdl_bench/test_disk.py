"""A full disk: the cell is reported with the directory, what is done stays whole, nothing more is begun for nothing."""

import contextlib
import errno
import os
import subprocess

import pytest

from bdl_bench.records import RecordStore
from bdl_bench.runner.disk import Disk, FullDiskError
from bdl_bench.runner.grid import Grid
from estimators.persistence import atomic


@pytest.fixture
def fills_up(monkeypatch):
    """fills_up(n): from the n-th write on the disk is full, until it is told that there is room."""
    state = {"left": 10**9}
    fsync = os.fsync

    def full_or_not(handle):
        state["left"] -= 1
        if state["left"] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(atomic.os, "fsync", full_or_not)
    return lambda n_writes: state.update(left=n_writes)


def run(grid):
    events = []
    records = grid.run(events.append)
    started = [e.method for e in events if e.status == "started"]
    return records, started


@pytest.mark.parametrize("n_writes", [3, 4], ids=["arrays", "record"])
def test_a_cell_that_cannot_be_written_has_failed_and_the_others_stay(n_writes, toy, fills_up, tmp_path):
    fills_up(n_writes)  # the network, two files of the first cell, perhaps the arrays of the second
    grid = Grid([toy], ["map", "last-layer-laplace", "laplace"], [0], tmp_path)
    records, started = run(grid)
    assert [r.status for r in records] == ["ok", "failed", "failed"]
    assert started == [None, "map", "last-layer-laplace"]  # laplace is not begun: its result could not be kept
    assert all(str(tmp_path.resolve()) in r.reason and "No space left" in r.reason for r in records[1:])
    assert RecordStore(tmp_path).all() == records[:1]
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]

    fills_up(10**9)
    again, started = run(grid)
    assert [r.status for r in again] == ["ok", "ok", "ok"]
    assert again[0] == records[0]
    assert started == [None, "last-layer-laplace", "laplace"]


def test_a_network_that_cannot_be_written_fails_its_cells(toy, fills_up, tmp_path):
    fills_up(0)
    records, started = run(Grid([toy], ["map"], [0, 1], tmp_path))
    assert [r.status for r in records] == ["failed", "failed"]
    assert started == [None]


def test_there_is_room_again_when_a_probe_can_be_written(fills_up, tmp_path):
    disk = Disk(tmp_path)
    disk.check()
    fills_up(0)
    with pytest.raises(FullDiskError, match="make room"), disk.writing():
        atomic.write_bytes(tmp_path / "a", b"x")
    with pytest.raises(FullDiskError):
        disk.check()
    fills_up(10**9)
    disk.check()
    assert not list(tmp_path.iterdir())


def test_other_errors_of_the_system_are_not_called_a_full_disk(tmp_path):
    disk = Disk(tmp_path)
    with pytest.raises(PermissionError), disk.writing():
        raise PermissionError(errno.EACCES, "no")
    disk.check()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 128 KiB, where this user may mount one."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(tmp_path)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def fill(path):
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_a_disk_that_is_really_full_is_reported_and_done_cells_stay(toy, small_disk):
    grid = Grid([toy], ["map", "last-layer-laplace", "laplace"], [0], small_disk)
    run(Grid([toy], ["map"], [0], small_disk))
    fill(small_disk / "filler")
    records, _ = run(grid)
    assert [r.status for r in records] == ["ok", "failed", "failed"]
    assert "free: 0 B" in records[1].reason
    (small_disk / "filler").unlink()
    assert [r.status for r in run(grid)[0]] == ["ok", "ok", "ok"]
