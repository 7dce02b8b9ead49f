"""What all executors promise, in process: order, exceptions as outcomes, and asking again where nothing can start."""

import pytest
import torch
from work_items import end

from bdl_bench.runner import executors
from bdl_bench.runner.executors import ONE_WORKER, JobQueue, Workers, check_workers, executor_for
from bdl_bench.runner.executors.outcomes import RemoteTraceback, outcome_from_bytes, run_job_to_bytes
from bdl_bench.runner.executors.worker_errors import worker_crashed
from estimators.errors import OptionError, UnsupportedError
from estimators.runtime import memory
from estimators.runtime.memory import machine_bytes
from estimators.runtime.units import in_bytes


def run(work, items, workers=ONE_WORKER):
    log = []
    with executor_for(workers) as executor:
        for item, outcome in executor.run(work, JobQueue(iter(items), lambda i: log.append(("started", i)))):
            log.append((item, outcome))
    return log


def test_one_item_ends_before_the_next_is_asked_for_and_started():
    asked = []

    def items():
        for n in (1, None, 2):
            asked.append((n, len(done)))
            yield n

    done = []
    log = run(lambda n: done.append(n) or 10 * n, items())
    assert log == [("started", 1), (1, 10), ("started", 2), (2, 20)]
    assert asked == [(1, 0), (None, 1), (2, 1)]


@pytest.mark.parametrize("word", ["raise", "memory", "allocator", "sys.exit"])
def test_an_exception_is_an_outcome_and_the_next_item_runs(word):
    kinds = {"raise": ValueError, "memory": MemoryError, "allocator": RuntimeError, "sys.exit": RuntimeError}
    (_, (_, outcome), *rest) = run(end, [word, "fine"])
    assert isinstance(outcome, kinds[word])
    assert rest[0] == ("started", "fine")


def test_an_interruption_is_no_outcome():
    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(interrupt, [1])


def test_work_has_the_threads_that_were_asked_for_and_the_caller_its_own():
    before = torch.get_num_threads()
    log = run(lambda _: torch.get_num_threads(), [1], Workers(threads=3))
    assert log[1] == (1, 3)
    assert torch.get_num_threads() == before


def test_an_exception_from_elsewhere_keeps_its_type_and_shows_where_it_was_raised():
    error = outcome_from_bytes(run_job_to_bytes(end, "raise"))
    assert isinstance(error, ValueError)
    assert isinstance(error.__cause__, RemoteTraceback)
    assert "in outcome" in str(error.__cause__)


@pytest.mark.parametrize(("word", "says"), [("odd", "Odd: 1 and 2"), ("lambda", "lambda")])
def test_what_cannot_be_sent_back_is_an_exception_that_says_so(word, says):
    assert says in str(outcome_from_bytes(run_job_to_bytes(end, word)))


@pytest.mark.parametrize(
    ("code", "says", "not_says"),
    [
        (-9, f"signal 9 (SIGKILL), probably out of memory (this machine has {in_bytes(machine_bytes())})", None),
        (-11, "signal 11 (SIGSEGV)", "memory"),
        (3, "ended with exit status 3", "memory"),
        (-1000, "signal 1000", "memory"),
    ],
)
def test_a_death_is_explained_by_its_exit_code(code, says, not_says):
    assert says in str(worker_crashed(code))
    assert not_says is None or not_says not in str(worker_crashed(code))


def test_one_job_is_in_process_and_several_are_local_where_none_is_named():
    assert [Workers(jobs).name for jobs in (None, 1, 2)] == ["in-process", "in-process", "local"]
    assert Workers(1, executor="local").name == "local"


@pytest.mark.parametrize(
    ("workers", "exclusive"),
    [
        (Workers(), True),
        (Workers(1, executor="local"), True),
        (Workers(2), False),
        (Workers(1, executor="ray"), False),
    ],
)
def test_only_one_job_on_this_machine_has_its_costs_for_itself(workers, exclusive):
    assert workers.exclusive is exclusive


def test_several_jobs_in_process_and_unknown_names_are_rejected():
    with pytest.raises(OptionError, match="--executor local"):
        executor_for(Workers(2, executor="in-process"))
    with pytest.raises(OptionError, match="in-process, local, ray"):
        check_workers(Workers(executor="abacus"))


def test_without_ray_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(executors.choice.importlib.util, "find_spec", lambda name: None)  # noqa: ARG005
    with pytest.raises(UnsupportedError, match=r'pip install "bdl-bench\[ray\]"'):
        check_workers(Workers(executor="ray"))


def test_the_memory_of_a_machine_is_that_of_its_container(tmp_path, monkeypatch):
    physical = machine_bytes()
    (tmp_path / "limit").write_text(f"{physical // 2}\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(memory, "_CONTAINER_LIMITS", (tmp_path / "none", tmp_path / "limit", tmp_path / "nowhere"))
    assert machine_bytes() == physical // 2
