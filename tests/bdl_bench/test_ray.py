"""A Ray cluster of two nodes: the records of one process, without a common disk, and with a node lost on the way."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from work_items import end

from bdl_bench.records import RecordStore
from bdl_bench.runner.executors import JobQueue, TimeLimitError, WorkerCrashedError, Workers, executor_for
from bdl_bench.runner.grid import Grid
from estimators.errors import OptionError

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]

MODULE = '''
import time
from pathlib import Path
import ray
import torch
from torch import nn
from bdl_bench import Problem
from estimators.training import Recipe

def make(seed):
    """A small regression problem with two outputs."""
    folder = Path(__file__).parent
    if (folder / "hold").exists():
        with (folder / f"begun.{seed}").open("a") as file:
            print(ray.get_runtime_context().get_node_id(), file=file)
        while not (folder / "go").exists():
            time.sleep(0.05)
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(40, 3, generator=g).double(), torch.randn(40, 2, generator=g).double()
    batches = list(zip(x.split(17), y.split(17)))
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    return Problem(model, "regression", batches, batches[:1], batches[:2], prior_precision=0.7, recipe=Recipe(epochs=9))
'''
METHODS = ["map", "last-layer-laplace", "laplace", "regvar"]
ON_RAY = Workers(executor="ray")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head and one more node, of one processor each; the driver's paths are those of the workers."""
    from ray.cluster_utils import Cluster

    folder = tmp_path_factory.mktemp("modules")
    (folder / "ray_problem.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.second, cluster.folder = cluster.add_node(num_cpus=1), folder
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    sys.path.remove(str(folder))


def grid(directory, workers):
    return Grid(["ray_problem:make"], METHODS, [0, 1], directory, workers=workers)


def assert_same(here, there):
    for ours, theirs in zip(RecordStore(here).all(), RecordStore(there).all(), strict=True):
        assert (ours.key, ours.status, ours.metrics) == (theirs.key, "ok", theirs.metrics)
        mine, other = RecordStore(here).arrays(ours), RecordStore(there).arrays(theirs)
        assert mine.keys() == other.keys() != set()
        assert all(np.array_equal(mine[name], other[name]) for name in mine)


def test_a_task_needs_a_machine_that_can_take_it(cluster):  # noqa: ARG001
    with pytest.raises(OptionError, match="fewer --threads"):
        executor_for(Workers(threads=2, executor="ray")).__enter__()


def test_exceptions_and_deaths_are_outcomes(cluster, monkeypatch):  # noqa: ARG001
    monkeypatch.setenv("BDL_BENCH_DATA", "somewhere")
    words = ["raise", "exit 3", "fine", "variable BDL_BENCH_DATA"]
    with executor_for(ON_RAY) as executor:
        outcomes = dict(executor.run(end, JobQueue(iter(words), print)))
    assert outcomes[words[3]] == "somewhere"
    assert isinstance(outcomes["raise"], ValueError)
    assert isinstance(outcomes["exit 3"], WorkerCrashedError)
    assert isinstance(outcomes["fine"], int)


def test_what_needs_longer_than_its_limit_is_ended(cluster):  # noqa: ARG001
    limits = {"sleep 600": 5.0, "sleep 601": 5.0}
    with executor_for(ON_RAY) as executor:
        outcomes = dict(executor.run(end, JobQueue(iter([*limits, "raise", "fine"]), print, limits.get)))
    assert isinstance(outcomes["sleep 600"], TimeLimitError)
    assert isinstance(outcomes["sleep 601"], TimeLimitError)
    assert isinstance(outcomes["raise"], ValueError)
    assert isinstance(outcomes["fine"], int)


def test_records_are_those_of_one_process_without_a_common_disk(cluster, tmp_path):  # noqa: ARG001
    grid(tmp_path / "here", Workers()).run(print)

    def take_weights_away(event):
        if event.status == "trained":
            for path in (tmp_path / "cluster" / "checkpoints").rglob("*.safetensors"):
                path.rename(path.with_suffix(".away"))

    grid(tmp_path / "cluster", ON_RAY).run(take_weights_away)
    assert_same(tmp_path / "here", tmp_path / "cluster")


def begun(folder, node):
    """The seeds whose problem was made on a node."""
    return {path.suffix for path in folder.glob("begun.*") if node.node_id in path.read_text().split()}


def test_what_a_lost_node_was_at_runs_again_elsewhere(cluster, tmp_path):
    folder, lost = cluster.folder, cluster.second
    grid(tmp_path / "here", Workers()).run(print)
    (folder / "hold").touch()

    def lose():
        while not begun(folder, lost):
            time.sleep(0.05)
        cluster.remove_node(lost, allow_graceful=False)
        (folder / "go").touch()

    with ThreadPoolExecutor() as beside:
        losing = beside.submit(lose)
        records = grid(tmp_path / "cluster", ON_RAY).run(print)
        losing.result()
    assert [(r.status, r.reason) for r in records] == [("ok", None)] * 8
    assert begun(folder, lost)
    assert begun(folder, cluster.head_node) == {".0", ".1"}
    assert_same(tmp_path / "here", tmp_path / "cluster")
