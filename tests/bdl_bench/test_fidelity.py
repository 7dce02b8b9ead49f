"""Distances from the posterior: by hand, on a linear model whose Laplace posterior is exact, and in the report."""

import csv
import itertools

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from bdl_bench.methods import METHODS, POSTERIOR, Method
from bdl_bench.metrics.fidelity import HALVES, fidelity, noise_floor, ranks_above_noise
from bdl_bench.problem import Problem
from bdl_bench.records import RecordStore
from bdl_bench.report import write_report
from bdl_bench.report.fidelity import fidelity_of_run, fidelity_sets
from bdl_bench.report.reproduce import command
from bdl_bench.report.results import group_by_task, load_records
from bdl_bench.report.seed_design import seed_design
from bdl_bench.runner.grid import Grid
from bdl_bench.tasks import TASKS
from bdl_bench.tasks.registry import Task
from estimators import Gaussian, ReferencePosterior
from estimators.errors import UnsupportedError
from estimators.sampling import ConvergenceCriteria
from estimators.training import Recipe


def near(value):
    return pytest.approx(value, rel=1e-9, abs=1e-12)


def predicted(rng, kind, shape=(40, 2)):
    logits, variance = rng.normal(size=shape), rng.gamma(2, size=shape)
    found = {"mean": logits, "epistemic_variance": variance}
    if kind == "classification":
        found["probs"] = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    if kind == "binary":
        found["probs"] = 1 / (1 + np.exp(-logits))
    return found


@pytest.mark.parametrize("kind", ["regression", "classification", "binary"])
def test_distances_match_their_formulas(kind):
    rng = np.random.default_rng(0)
    ours, exact = predicted(rng, kind), predicted(rng, kind)
    found = fidelity(kind, ours, exact)
    v, e = ours["epistemic_variance"].ravel(), exact["epistemic_variance"].ravel()
    shift = abs(ours["mean"] - exact["mean"]).ravel()
    assert found.spearman == near(spearmanr(v, e).statistic)
    assert found.mean_ratio == near(np.mean(v / e))
    assert found.relative_rmse == near(np.mean((v / e - 1) ** 2) ** 0.5)
    assert found.mean_shift == near(np.mean(shift / e**0.5))
    assert found.w2 == near(np.mean(np.sqrt(shift**2 + (v**0.5 - e**0.5) ** 2)))
    if kind == "classification":
        assert found.total_variation == near(0.5 * abs(ours["probs"] - exact["probs"]).sum(-1).mean())
        assert found.top_agreement == near(np.mean(ours["mean"].argmax(-1) == exact["mean"].argmax(-1)))
    elif kind == "binary":
        assert found.total_variation == near(abs(ours["probs"] - exact["probs"]).mean())
        assert found.top_agreement == near(np.mean((ours["mean"] > 0) == (exact["mean"] > 0)))
    else:
        assert (found.total_variation, found.top_agreement) == (None, None)


def test_the_posterior_has_no_distance_from_itself_and_a_constant_variance_no_order():
    exact = predicted(np.random.default_rng(1), "classification")
    found = fidelity("classification", exact, exact)
    assert (found.spearman, found.mean_ratio, found.w2, found.total_variation, found.top_agreement) == near(
        (1, 1, 0, 0, 1)
    )
    constant = {**exact, "epistemic_variance": np.zeros((40, 2))}
    assert fidelity("classification", constant, exact).spearman is None
    assert fidelity("classification", constant, exact).w2 == near(np.sqrt(exact["epistemic_variance"]).mean())


def test_the_noise_floor_is_half_of_the_distance_between_the_halves():
    rng = np.random.default_rng(2)
    even, odd, whole = (predicted(rng, "classification") for _ in range(3))
    halves = {f"{half}_{name}": a for half, found in (("even", even), ("odd", odd)) for name, a in found.items()}
    floor, apart = noise_floor("classification", whole | halves), fidelity("classification", even, odd)
    assert floor.total_variation == near(apart.total_variation / 2)
    assert floor.w2 == near(apart.w2 / 2)
    assert floor.spearman == near((1 - apart.spearman) / 2)
    assert floor.mean_ratio == near(abs(apart.mean_ratio - 1) / 2)
    assert floor.top_agreement == near((1 - apart.top_agreement) / 2)
    in_units = abs(even["mean"] - odd["mean"]) / np.sqrt(whole["epistemic_variance"])
    assert floor.mean_shift == near(in_units.mean() / 2)


def test_methods_within_the_noise_floor_share_a_rank():
    distances = {"a": 0.30, "b": 0.10, "c": 0.105, "d": 0.111, "e": 0.119}
    assert ranks_above_noise(distances, 0.01) == {"b": 1, "c": 1, "d": 3, "e": 3, "a": 5}
    assert ranks_above_noise(distances, 0.0) == {"b": 1, "c": 2, "d": 3, "e": 4, "a": 5}
    assert ranks_above_noise({}, 0.01) == {}


def linear(seed):
    """A linear regression, whose posterior is Gaussian."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 0.5, 1.5])
    x[:, 2] += x[:, 0]  # a diagonal covariance is wrong
    y = x.sum(-1, keepdim=True) + torch.randn(40, 1, generator=generator, dtype=torch.float64)
    rows = [[(x[a:b], y[a:b])] for a, b in ((0, 18), (18, 28), (28, 40))]
    network = nn.Linear(3, 1).double()
    return Problem(
        network, Gaussian(1.5), *rows, prior_precision=3.0, recipe=Recipe(epochs=2), ood={"far": [4 * x[28:]]}
    )  # fmt: skip


def trained_linear(seed):
    """The same, with a network that came trained."""
    problem = linear(seed)
    problem.recipe = None
    problem.model.eval()
    return problem


LOOSE = ConvergenceCriteria(max_r_hat=1.05, min_bulk_ess=200, min_squares_ess=100, max_total_variation=0.05,
                            max_query_total_variation=0.05)  # fmt: skip


def sampled(problem, seed):
    options = {"n_chains": 8, "n_draws": 1600, "criteria": LOOSE, "seed": seed}
    return ReferencePosterior(problem.model, problem.likelihood, prior_precision=3.0, **options)


def starved(problem, seed):
    return ReferencePosterior(problem.model, problem.likelihood, prior_precision=3.0, max_gradients=200, seed=seed)


def run(directory, methods, *, task="linear", seeds=(0,), listener=lambda event: None, **options):  # noqa: ARG005
    return Grid([task], methods, seeds, directory, **options).run(listener)


METHODS_RUN = ["map", "laplace", "laplace-diag", POSTERIOR]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The directory of a comparison on the linear model at its converged MAP."""
    directory = tmp_path_factory.mktemp("fidelity")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "linear", Task("linear", "a linear model", linear))
        patch.setitem(METHODS, POSTERIOR, Method(POSTERIOR, "sampled", sampled))
        records = run(directory, METHODS_RUN, seeds=(0, 1), tune_budget=1, converged_map=True)
    assert {record.status for record in records} == {"ok"}, [record.reason for record in records]
    write_report(directory)
    return directory


def results_of(directory):
    store = RecordStore(directory)
    return group_by_task(store, load_records(store))[0]


def sets_of(directory):
    return fidelity_sets(results_of(directory), seed_design(results_of(directory)))


def test_seeds_with_identical_predictions_count_as_one_distance(write_record, tmp_path):
    store = RecordStore(tmp_path)
    for seed, method in itertools.product(range(4), ("map", "laplace", POSTERIOR)):
        record, source = write_record("a", method, seed, scale=0.1 * len(method)), seed // 3  # seeds 0, 1, 2 are copies
        arrays = store.arrays(record if source else store.read("a", method, 0))
        rng = np.random.default_rng(source)
        for half in HALVES if method == POSTERIOR else ():
            arrays[f"{half}_mean"] = arrays["mean"] + rng.normal(size=arrays["mean"].shape)
            arrays[f"{half}_epistemic_variance"] = arrays["epistemic_variance"]
        store.write(record, arrays)
    (found,) = sets_of(tmp_path)
    results = results_of(tmp_path)
    distances = [fidelity_of_run(results, "laplace", seed, "test").w2 for seed in (0, 3)]
    row = next(row for row in found.untuned.rows if row.method == "laplace")
    assert distances[0] != near(distances[1])
    assert (row.intervals["w2"].mean, row.intervals["w2"].n, row.rank) == (near(np.mean(distances)), 2, 1)
    floors = [noise_floor("regression", results.predictions(POSTERIOR, seed)).w2 for seed in (0, 3)]
    assert found.floor["w2"] == near(np.mean(floors))


def test_laplace_of_a_linear_model_is_the_posterior_up_to_the_noise_floor(compared):
    near_rows, far = sets_of(compared)
    assert (near_rows.key, far.key) == ("test", "ood/far")
    for found in (near_rows, far):
        distances = found.untuned.distances("w2")
        ranks = {row.method: row.rank for row in found.untuned.rows}
        assert distances["laplace"] < 2 * found.floor["w2"]  # the floor estimates the error within about a factor 1.5
        assert distances["map"] > 10 * found.floor["w2"]
        assert ranks["laplace"] == 1 < ranks["laplace-diag"] < ranks["map"]
        shift = found.untuned.distances("mean_shift")
        assert shift["laplace"] == near(shift["map"])  # one mean
        assert shift["laplace"] < 3 * found.floor["mean_shift"]
        assert abs(found.untuned.distances("mean_ratio")["laplace"] - 1) < 0.1


def test_the_records_have_both_halves_and_how_near_training_came_to_the_optimum(compared):
    store = RecordStore(compared)
    record = store.read("linear", POSTERIOR, 0)
    arrays = store.arrays(record)
    for prefix in ("", "ood/far/"):
        halves = 0.5 * (arrays[f"{prefix}even_mean"] + arrays[f"{prefix}odd_mean"])
        assert halves == pytest.approx(arrays[f"{prefix}mean"], rel=1e-6)
        assert not np.array_equal(arrays[f"{prefix}even_mean"], arrays[f"{prefix}odd_mean"])
    assert not any("even" in name for name in arrays if name.startswith("tuned/"))
    assert record.training.convergence.reached
    assert record.relative_gradient == pytest.approx(record.training.convergence.relative_gradient, rel=1e-6)
    assert "L-BFGS" in record.training.summary


def test_the_report_says_who_is_nearest_and_can_be_rendered_again_from_records(compared):
    page = (compared / "report.html").read_text(encoding="utf-8")
    assert "Fidelity: distance from the posterior" in page
    assert "laplace is nearest to the posterior (W2 " in page
    assert "has the lowest mean NLL (" in page
    assert "--converged-map" in page
    assert "Agreement with linearized Laplace" in page
    rows = list(csv.DictReader((compared / "report.csv").read_text(encoding="utf-8").splitlines()))
    found = {(r["method"], r["variant"], r["quantity"]): r for r in rows if r["quantity"].startswith("fidelity/")}
    sets = sets_of(compared)
    assert float(found["laplace", "untuned", "fidelity/test/w2"]["mean"]) == sets[0].untuned.distances("w2")["laplace"]
    assert float(found["", "noise floor", "fidelity/ood/far/w2"]["mean"]) == sets[1].floor["w2"]
    assert ("laplace", "tuned", "fidelity/test/w2") in found
    before = (compared / "report.csv").read_bytes()
    (compared / "report.html").unlink()
    write_report(compared)
    assert (compared / "report.csv").read_bytes() == before
    assert "laplace is nearest to the posterior" in (compared / "report.md").read_text(encoding="utf-8")


def test_the_commands_that_reproduce_a_report_continue_the_training(compared, monkeypatch):
    records = RecordStore(compared).all()
    assert "converged_map=True" in command(records)
    monkeypatch.setitem(TASKS, "linear", Task("linear", "a linear model", linear))
    assert "--converged-map" in command(records)
    plain = [r.model_copy(update={"training": r.training.model_copy(update={"convergence": None})}) for r in records]
    assert "--converged-map" not in command(plain)


def test_a_posterior_that_is_not_reached_is_skipped_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "linear", Task("linear", "a linear model", linear))
    monkeypatch.setitem(METHODS, POSTERIOR, Method(POSTERIOR, "starved", starved))
    _, record = run(tmp_path, ["map", POSTERIOR])
    assert record.status == "skipped"
    assert "ReferenceNotReachedError" in record.reason
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "The posterior is not known at any seed" in page
    assert "Reference not reached" in page


def test_the_preset_judges_chains_at_every_family_of_shifts_at_its_largest_severity():
    problem = linear(0)
    x, y = torch.randn(4, 3), torch.randn(4, 1)
    x, y = x[:, : problem.test[0][0].shape[1]].to(problem.test[0][0]), y.to(problem.test[0][1])
    problem.shifts = {
        name: [(i + x, y)] for i, name in enumerate(["noise-1", "noise-10", "noise-9", "blurred", "hazy"])
    }
    problem.ood = {}
    found = METHODS[POSTERIOR].build(problem, 0).ood_check_rows
    assert [float((rows - x).mean()) for rows in found] == pytest.approx([1, 3, 4])


def test_the_preset_says_how_large_a_network_may_be_and_judges_chains_at_the_test_rows():
    problem = linear(0)
    built = METHODS[POSTERIOR].build(problem, 3)
    assert torch.equal(built.check_rows, torch.cat([x for x, _ in problem.test]))
    assert built.seed == 3
    rows = [(torch.randn(4, 3), torch.randn(4, 2000))]
    large = Problem(nn.Linear(3, 2000).eval(), "regression", rows, rows, rows, prior_precision=1.0)
    with pytest.raises(UnsupportedError, match="5,000 weights"):
        METHODS[POSTERIOR].build(large, 0)


def test_without_the_posterior_there_is_no_section(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "linear", Task("linear", "a linear model", linear))
    run(tmp_path, ["map", "laplace"])
    assert "Fidelity" not in write_report(tmp_path).read_text(encoding="utf-8")


def test_a_network_that_came_trained_is_not_converged_silently(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "given", Task("given", "a trained linear model", trained_linear))
    (record,) = run(tmp_path, ["map"], task="given", converged_map=True)
    assert record.status == "skipped"
    assert "converged_map" in record.reason


def test_converged_training_has_a_key_of_its_own_and_is_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "linear", Task("linear", "a linear model", linear))
    events = []
    records = [
        run(tmp_path, ["map"], listener=events.append, converged_map=converged)[0] for converged in (False, True, True)
    ]
    assert records[0].key != records[1].key == records[2].key
    assert records[0].training.convergence is None
    assert records[0].relative_gradient > 0.1 > records[1].relative_gradient
    trainings = [event.status for event in events if event.method is None and event.status in ("trained", "cached")]
    assert trainings == ["trained", "trained", "cached"]
    assert records[2].training == records[1].training
