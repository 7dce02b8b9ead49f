"""A comparison on a simulated accelerator, from training to the report: the numbers of the CPU."""

import pytest
import torch
from brief_refits import with_brief_refits
from simulated_device import DEVICE, generators_of_the_device
from torch import nn

from bdl_bench import Problem, compare
from bdl_bench.runner.preflight import check_problem
from estimators.training import Recipe

METHODS = ["last-layer-laplace", "laplace-kron", "regvar-finetune"]


@pytest.fixture(autouse=True)
def _generators():
    with generators_of_the_device():
        yield


def make_problem(seed):
    """Three classes of three inputs, with rows of another distribution and shifted ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (20,), generator=generator)
    batches = list(zip(x.split(7), y.split(7), strict=True))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return Problem(
        network,
        "classification",
        batches,
        batches[:3],
        batches[2:],
        prior_precision=0.5,
        recipe=Recipe(epochs=2),
        ood={"far": [3 * x]},
        shifts={"noise": [(x + 0.1, y)]},
    )


def found(tmp_path, device):
    compared = compare(
        make_problem, METHODS, seeds=1, out=tmp_path / device, device=device, tune_budget=2, progress_bar=False
    )
    return {record.method: record for record in compared.records}


def test_a_comparison_on_a_device_has_the_numbers_of_the_cpu(tmp_path, monkeypatch):
    with_brief_refits(monkeypatch)
    here, there = found(tmp_path, "cpu"), found(tmp_path, str(DEVICE))
    assert here.keys() == there.keys() == set(METHODS)
    for method, record in there.items():
        assert (record.status, record.reason) == ("ok", here[method].reason), method
        assert record.metrics == pytest.approx(here[method].metrics, rel=1e-7), method
        assert record.tuned == pytest.approx(here[method].tuned, rel=1e-7), method
    assert (tmp_path / str(DEVICE) / "report.html").exists()


def test_a_problem_on_a_device_is_checked_there():
    problem = make_problem(0)
    problem.model.eval()
    levels = [
        {finding.name: finding.level for finding in check_problem(each).findings}
        for each in (problem, make_problem(0).on(DEVICE))
    ]
    assert levels[0] == levels[1]
