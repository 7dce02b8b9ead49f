"""File locks: one run at a time has a file; what can start next is what no other run has locked."""

import pytest

from bdl_bench.runner.locks import FileLocks
from bdl_bench.runner.schedule import Schedule
from estimators.persistence.atomic import discard_leftovers, write_bytes


@pytest.fixture
def two_runs(tmp_path):
    with FileLocks(tmp_path) as mine, FileLocks(tmp_path) as theirs:
        yield mine, theirs


def test_a_file_is_locked_once_until_it_is_released(two_runs, tmp_path):
    mine, theirs = two_runs
    path = tmp_path / "records" / "task" / "map.json"
    assert mine.acquire(path)
    assert not theirs.acquire(path)
    assert not mine.acquire(path)
    mine.release(path)
    assert theirs.acquire(path)
    assert not path.parent.exists()


def test_leaving_releases_everything(tmp_path):
    with FileLocks(tmp_path) as first:
        assert first.acquire(tmp_path / "a")
    with FileLocks(tmp_path) as second:
        assert second.acquire(tmp_path / "a")


def test_runs_see_each_other_and_not_what_is_left_of_dead_ones(two_runs, tmp_path):
    mine, theirs = two_runs
    (tmp_path / "locks" / "runs" / "dead.lock").touch()
    assert mine.has_other_runs()
    theirs.__exit__()
    assert not mine.has_other_runs()
    assert len(list((tmp_path / "locks" / "runs").iterdir())) == 1


class Told:
    """A schedule of file names, and what it said."""

    def __init__(self, locks, root, *, settled=()):
        self.failed, self.waiting = [], []
        self.schedule = Schedule(
            locks,
            root.joinpath,
            prepare=lambda item: self.found(item, settled),
            failed=lambda item, error: self.failed.append((item, type(error))),
            waiting=self.waiting.append,
        )

    @staticmethod
    def found(item, settled):
        if item == "full":
            raise OSError(28, "No space left on device")
        return None if item in settled else item


def test_what_another_run_has_locked_waits(two_runs, tmp_path):
    mine, theirs = two_runs
    theirs.acquire(tmp_path / "a")
    told = Told(mine, tmp_path)
    for item in "abc":
        told.schedule.add(item)
    assert [next(told.schedule) for _ in range(4)] == ["b", "c", None, None]
    assert told.waiting == ["a"]
    theirs.release(tmp_path / "a")
    assert next(told.schedule) == "a"


def test_what_is_settled_meanwhile_is_released_at_once_and_what_cannot_be_locked_is_reported(two_runs, tmp_path):
    mine, theirs = two_runs
    told = Told(mine, tmp_path, settled="a")
    for item in ("a", "full", "c"):
        told.schedule.add(item)
    assert next(told.schedule) == "c"
    assert told.failed == [("full", OSError)]
    assert theirs.acquire(tmp_path / "a")
    assert theirs.acquire(tmp_path / "full")


def test_items_may_come_until_the_last_one_is_closed(two_runs, tmp_path):
    mine, theirs = two_runs
    told = Told(mine, tmp_path)
    told.schedule.add("a")
    assert [next(told.schedule), next(told.schedule)] == ["a", None]
    assert not theirs.acquire(tmp_path / "a")
    told.schedule.add("b")
    told.schedule.close("a")
    assert theirs.acquire(tmp_path / "a")
    assert next(told.schedule) == "b"
    told.schedule.close("b")
    with pytest.raises(StopIteration):
        next(told.schedule)


def test_only_the_leftovers_of_this_file_are_discarded(tmp_path):
    for name in (".map.json.abc.part", ".map.json.def.part", ".laplace.json.abc.part", "map.json.part"):
        (tmp_path / name).touch()
    write_bytes(tmp_path / "map.json", b"{}")
    discard_leftovers(tmp_path / "map.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".laplace.json.abc.part", "map.json", "map.json.part"]
    discard_leftovers(tmp_path / "nowhere" / "map.json")
