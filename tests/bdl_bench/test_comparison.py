"""The comparison from Python: what it takes, and what comes back."""

import pytest
import torch
from torch import nn

import bdl_bench
from bdl_bench import Problem, compare
from bdl_bench.tasks import TASKS
from estimators.errors import OptionError
from estimators.training import Recipe


def make_problem(seed):
    """Two outputs of three inputs."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(24, n, generator=generator, dtype=torch.float64) for n in (3, 2))
    batches = list(zip(x.split(7), y.split(7), strict=True))
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return Problem(network, "regression", batches, batches, batches[:2], prior_precision=0.5, recipe=Recipe(epochs=2))


def run(problem, tmp_path, **options):
    return compare(problem, ["map", "last-layer-laplace"], out=tmp_path, progress_bar=False, **options)


def test_a_factory_is_a_task_of_its_name_and_gone_afterwards(tmp_path):
    found = run(make_problem, tmp_path, seeds=2)
    assert {(r.task, r.method, r.seed, r.status) for r in found.records} == {
        ("make_problem", method, seed, "ok") for method in ("map", "last-layer-laplace") for seed in (0, 1)
    }
    assert found.records[0].task_summary == "Two outputs of three inputs."
    assert "make_problem" not in TASKS
    assert found.report == tmp_path / "report.html"


def test_a_problem_is_trained_anew_for_each_seed_and_itself_left_alone(tmp_path):
    problem = make_problem(3)
    before = {name: p.clone() for name, p in problem.model.state_dict().items()}
    found = run(problem, tmp_path, seeds=[0, 5])
    assert sorted({r.seed for r in found.records}) == [0, 5]
    assert all(torch.equal(before[name], p) for name, p in problem.model.state_dict().items())
    first, second = ((tmp_path / "checkpoints" / "problem" / f"seed-{n}.safetensors").read_bytes() for n in (0, 5))
    assert first != second


def test_a_second_call_with_the_same_folder_computes_nothing_again(tmp_path):
    run(make_problem, tmp_path, seeds=1)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "records").rglob("*.json")}
    run(make_problem, tmp_path, seeds=1)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "records").rglob("*.json")} == before


def test_tuned_numbers_are_there_beside_those_as_fitted(tmp_path):
    records = run(make_problem, tmp_path, seeds=1, tune_budget=3).records
    record = next(r for r in records if r.method == "last-layer-laplace")
    assert record.metrics.keys() == record.tuned.keys()
    assert record.tuning.option == "prior_precision"
    assert {point["value"] for point in record.tuning.points} == {0.005, 0.5, 50.0}
    assert record.tuning.fits == 2
    assert record.tuning.chosen["score"] == min(point["score"] for point in record.tuning.points)


def test_what_is_no_problem_is_rejected(tmp_path):
    with pytest.raises(OptionError, match="a int"):
        compare(3, out=tmp_path)
    with pytest.raises(OptionError, match="nothing-of-the-kind"):
        compare("nothing-of-the-kind", out=tmp_path)
    with pytest.raises(AttributeError, match="no_such_name"):
        bdl_bench.no_such_name  # noqa: B018
