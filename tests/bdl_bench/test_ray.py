"""A Ray cluster of two nodes: the records of one process, without a common disk, and with a node lost on the way."""

import sys

import numpy as np
import pytest
from work_items import end

from bdl_bench.executors import WorkerDiedError, Workers, executor_for
from bdl_bench.grid import Grid
from bdl_bench.records import RecordStore
from estimators.errors import OptionError

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]

MODULE = '''
import torch
from torch import nn
from bdl_bench import Problem
from estimators.training import Recipe

def make(seed):
    """A small regression problem with two outputs."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(40, 3, generator=g).double(), torch.randn(40, 2, generator=g).double()
    batches = list(zip(x.split(17), y.split(17)))
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    return Problem(model, "regression", batches, batches[:1], batches[:2], prior_precision=0.7, recipe=Recipe(epochs=9))
'''
METHODS = ["map", "last-layer", "laplace", "regvar-krylov"]
ON_RAY = Workers(executor="ray")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head and one more node, of one processor each; the driver's paths are those of the workers."""
    from ray.cluster_utils import Cluster

    folder = tmp_path_factory.mktemp("modules")
    (folder / "ray_problem.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.second = cluster.add_node(num_cpus=1)
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


def test_exceptions_and_deaths_are_outcomes(cluster):  # noqa: ARG001
    with executor_for(ON_RAY) as executor:
        outcomes = dict(executor.run(end, iter(["raise", "exit 3", "fine"]), started=print))
    assert isinstance(outcomes["raise"], ValueError)
    assert isinstance(outcomes["exit 3"], WorkerDiedError)
    assert isinstance(outcomes["fine"], int)


def test_records_are_those_of_one_process_without_a_common_disk_and_with_a_node_lost_on_the_way(cluster, tmp_path):
    grid(tmp_path / "here", Workers()).run(print)
    events = []

    def disturb(event):
        events.append(event)
        if event.status == "trained":  # the weights travel by themselves
            for path in (tmp_path / "cluster" / "maps").rglob("*.safetensors"):
                path.rename(path.with_suffix(".away"))
        if event.status == "ok" and cluster.second is not None:
            cluster.remove_node(cluster.second, allow_graceful=False)
            cluster.second = None

    records = grid(tmp_path / "cluster", ON_RAY).run(disturb)
    assert [(r.status, r.reason) for r in records] == [("ok", None)] * 8
    assert cluster.second is None
    assert_same(tmp_path / "here", tmp_path / "cluster")
