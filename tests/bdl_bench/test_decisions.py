"""Decisions: acquisition against designs and integrals worked out by hand, regret, pairing, and resumed runs."""

import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from fork_server import call
from scipy.integrate import quad
from torch import nn

from bdl_bench.decisions import Learner, run_decision
from bdl_bench.decisions.acquisition import (
    check_has_variance,
    log_expected_improvement,
    sample_rows_by_score,
    top_rows,
)
from bdl_bench.decisions.interventions import learned_noise, with_label_noise
from bdl_bench.decisions.learner import Labelled
from bdl_bench.decisions.optimisation import regret
from bdl_bench.methods import METHODS
from bdl_bench.methods.registry import preset
from bdl_bench.metrics import evaluate
from bdl_bench.metrics.decisions import area
from bdl_bench.problem import ActiveLearning, BayesianOptimisation, Interventions, Problem
from bdl_bench.records import RecordStore
from bdl_bench.report import write_report
from bdl_bench.report.sections.interventions import Effect, as_expected, effect_words
from bdl_bench.runner.grid import Grid
from bdl_bench.stats import mean_interval, verdicts
from bdl_bench.tasks import TASKS
from bdl_bench.tasks.registry import Task
from estimators import LinearizedLaplace
from estimators.errors import ModelError, OptionError, UnsupportedError
from estimators.likelihoods import Gaussian
from estimators.runtime.rng import seeded
from estimators.training import Recipe
from estimators.training.training import train_map

SIGMA, DELTA = 0.4, 2.5
RECIPE = Recipe(epochs=4, batch_size=7, optimizer="adam", lr=0.05)


def linear():
    return nn.Linear(3, 1).double()


def classes():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def make(decision, seed=0, *, kind="regression", n_pool=12, n_train=9, make_model=None, **options):
    """A small problem of three inputs, whose target has another unit than the outputs."""
    g = torch.Generator().manual_seed(seed + 7)
    sizes = (n_train, 10, 11, n_pool)
    x = torch.randn(sum(sizes), 3, generator=g, dtype=torch.float64)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]]).double() + 0.3 * torch.randn(len(x), 1, generator=g).double()
    likelihood = Gaussian(SIGMA, target_shift=3.0, target_scale=5.0)
    if kind == "classification":
        y, likelihood = torch.bucketize(y[:, 0].contiguous(), torch.tensor([-1.0, 1.0]).double()), kind
    *split, pool = ([(a, b)] for a, b in zip(x.split(sizes), y.split(sizes), strict=True))
    make_model = make_model or (linear if kind == "regression" else classes)
    if not isinstance(decision, Interventions):
        options["pool"] = pool
    with seeded(seed):
        model = make_model()
    return Problem(model, likelihood, *split, prior_precision=DELTA, recipe=RECIPE, make_model=make_model,
                   decision=decision, **options)  # fmt: skip


def learner(problem, method="laplace", seed=0):
    problem = problem.kept()
    train_map(problem.model, problem.likelihood, problem.train, prior_precision=DELTA, recipe=RECIPE, seed=seed)
    build = METHODS[method].build if isinstance(method, str) else method
    return Learner(problem, build, seed)


def features(x):
    return np.hstack([x.numpy(), np.ones((len(x), 1))])


def test_variance_chooses_the_d_optimal_row_of_a_linear_model():
    found = learner(make(ActiveLearning(n_rounds=4, n_per_round=1)))
    queried = run_decision(found).arrays["queried"]
    phi, chosen = features(found.pool.x), []
    precision = features(found.start.x).T @ features(found.start.x) / SIGMA**2 + DELTA * np.eye(4)
    for _ in range(4):
        gain = [np.linalg.slogdet(precision + np.outer(f, f) / SIGMA**2)[1] for f in phi]
        chosen.append(max((i for i in range(len(phi)) if i not in chosen), key=lambda i: gain[i]))
        precision = precision + np.outer(phi[chosen[-1]], phi[chosen[-1]]) / SIGMA**2
    assert queried.tolist() == chosen


def test_a_round_takes_the_rows_with_the_largest_predictive_variance():
    found = learner(make(ActiveLearning(n_rounds=1, n_per_round=5)))
    phi = features(found.pool.x)
    covariance = np.linalg.inv(features(found.start.x).T @ features(found.start.x) / SIGMA**2 + DELTA * np.eye(4))
    order = np.argsort(-np.einsum("nd,de,ne->n", phi, covariance, phi))
    assert run_decision(found).arrays["queried"].tolist() == order[:5].tolist()


@pytest.mark.parametrize("gap", [-30.0, -3.0, -0.5, 0.0, 1e-9, 0.7, 4.0])
@pytest.mark.parametrize("s", [0.3, 1.7])
def test_expected_improvement_is_the_integral(gap, s):
    # ∫ max(f − best, 0) p(f) df, over u = f − best > 0, scaled by the density at its largest value
    best, mean = -1.3, -1.3 + gap
    top = max(gap, 0.0)
    scale = -0.5 * ((top - gap) / s) ** 2

    def integrand(u):
        return u * math.exp(-0.5 * ((u - gap) / s) ** 2 - scale)

    value = quad(integrand, 0.0, top + 12 * s, points=[top + 0.1 * s], epsabs=0, epsrel=1e-12, limit=400)[0]
    expected = math.log(value / (s * math.sqrt(2 * math.pi))) + scale
    found = log_expected_improvement(np.array([mean]), np.array([s**2]), best)
    assert found[0] == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_expected_improvement_orders_far_rows_and_certain_rows():
    far = log_expected_improvement(np.array([-2e3, -1e3, -999.0, -1.0]), np.ones(4), 0.0)
    assert np.isfinite(far).all()
    assert (np.diff(far) > 0).all()
    near = log_expected_improvement(np.array([-1000.001, -999.999]), np.ones(2), 0.0)
    assert near[1] - near[0] == pytest.approx(2.0, rel=1e-3)  # d log EI / dz is −z, across the change of formula
    certain = log_expected_improvement(np.array([2.0, -1.0]), np.zeros(2), 0.5)
    assert certain.tolist() == [math.log(1.5), -math.inf]


def test_top_rows_are_the_first_of_equal_rows_and_none_twice():
    assert top_rows(np.array([1.0, 3.0, 3.0, 2.0]), (1,), 2) == (2, 3)
    assert top_rows(np.zeros(3), (), 2) == (0, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite_choose_no_rows(bad):
    scores = np.array([0.3, bad, 0.1, bad])
    with pytest.raises(ModelError, match="Received 2 of 4"):
        check_has_variance(scores)
    with pytest.raises(ModelError, match="2 of 4 that are NaN"):
        top_rows(np.where(np.isfinite(scores), scores, np.nan), (), 2)
    with pytest.raises(ModelError, match="NaN"):
        sample_rows_by_score(np.full(4, np.nan), (), 2, (0, 0))
    assert top_rows(np.array([-np.inf, 0.1, -np.inf]), (), 2) == (1, 0), "an expected improvement of 0 comes last"


def test_drawn_rows_are_in_proportion_to_their_scores_and_none_comes_twice():
    scores = np.array([1.0, 2.0, 0.0, 5.0, 4.0])
    first = np.bincount([sample_rows_by_score(scores, (3,), 1, (0, i))[0] for i in range(4000)], minlength=5) / 4000
    assert first == pytest.approx([1 / 7, 2 / 7, 0, 0, 4 / 7], abs=0.03)
    pairs = [sample_rows_by_score(scores, (3,), 2, (1, i)) for i in range(4000)]
    second = np.mean([pair == (4, 1) for pair in pairs])
    assert second == pytest.approx(4 / 7 * 2 / 3, abs=0.03)  # without replacement
    assert sorted(sample_rows_by_score(scores, (), 5, (0, 0))) == [0, 1, 2, 3, 4]
    assert sample_rows_by_score(scores, (), 5, (0, 0))[-1] == 2


@pytest.mark.parametrize("maximise", [True, False])
def test_regret_of_the_whole_pool_is_zero_and_never_grows(maximise):
    decision = BayesianOptimisation(n_queries=12, maximise=maximise)
    found = learner(make(decision))
    arrays = run_decision(found).arrays
    y = 3 + 5 * torch.cat([found.start.y, found.pool.y])[:, 0].numpy()
    best = y.max() if maximise else y.min()
    start = 3 + 5 * found.start.y[:, 0].numpy()
    for name in ("regret", "random_regret", "greedy_regret"):
        assert arrays[name].shape == (13,)
        assert arrays[name][0] == pytest.approx(abs(best - (start.max() if maximise else start.min())), rel=1e-12)
        assert arrays[name][-1] == 0
        assert (np.diff(arrays[name]) <= 0).all()
    assert sorted(arrays["queried"]) == list(range(12))


def test_regret_counts_the_rows_at_the_start():
    found = learner(make(BayesianOptimisation(n_queries=1)))
    found.pool = Labelled(found.pool.x, found.pool.y * 0 - 100)
    assert regret(found, (0,), BayesianOptimisation(n_queries=1)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("decision", [ActiveLearning(n_rounds=2, n_per_round=3), BayesianOptimisation(n_queries=4)])
def test_random_queries_do_not_depend_on_the_method(decision):
    one, two = (run_decision(learner(make(decision), method)).arrays for method in ("laplace", "last-layer-laplace"))
    other = run_decision(learner(make(decision), preset(LinearizedLaplace, hessian_structure="diag"))).arrays
    names = [n for n in one if n.startswith(("random_network", "greedy")) or n == "random_regret"]
    assert names
    for name in names:
        assert np.array_equal(one[name], two[name])
        assert np.array_equal(one[name], other[name])


def test_networks_that_are_kept_for_other_methods_change_nothing():
    decision = ActiveLearning(n_rounds=2, n_per_round=3)
    first, second = learner(make(decision)), learner(make(decision), "ensemble")
    alone = run_decision(second).arrays
    run_decision(first)
    second.networks = first.networks
    again = run_decision(second).arrays
    assert first.networks
    for name, array in alone.items():
        assert np.array_equal(array, again[name])


@pytest.mark.parametrize(
    ("decision", "kind"),
    [
        (ActiveLearning(n_rounds=2, n_per_round=3), "regression"),
        (ActiveLearning(n_rounds=1, n_per_round=2, acquisition="mutual_information", batch="power"), "classification"),
        (Interventions(sizes=(4, 9), label_noise=(0.0, 0.5)), "regression"),
        (Interventions(sizes=(4, 9), label_noise=(0.0, 0.5)), "classification"),
    ],
)
def test_the_same_seed_gives_the_same_curves(decision, kind):
    one, two = (run_decision(learner(make(decision, kind=kind), "ensemble")).arrays for _ in range(2))
    other = run_decision(learner(make(decision, kind=kind), "ensemble", seed=1)).arrays
    for name, array in one.items():
        assert np.array_equal(array, two[name])
    assert any(not np.array_equal(array, other[name]) for name, array in one.items())


@pytest.mark.parametrize(
    ("decision", "kind"),
    [
        (ActiveLearning(n_rounds=1, n_per_round=2), "regression"),
        (BayesianOptimisation(n_queries=2), "regression"),
        (ActiveLearning(n_rounds=1, n_per_round=2, acquisition="mutual_information"), "classification"),
        (Interventions(sizes=(4, 9), label_noise=(0.0, 0.5)), "regression"),
    ],
)
def test_a_method_without_a_variance_cannot_decide(decision, kind):
    with pytest.raises(UnsupportedError, match="epistemic variance"):
        run_decision(learner(make(decision, kind=kind), "map"))


class VarianceAlone:
    def fit(self, train_loader):
        pass

    def variance(self, x):
        return torch.ones(len(x), 3)


def test_a_method_without_samples_has_no_mutual_information():
    decision = ActiveLearning(n_rounds=1, n_per_round=2, acquisition="mutual_information")
    with pytest.raises(UnsupportedError, match="function samples"):
        run_decision(learner(make(decision, kind="classification"), lambda *_: VarianceAlone()))


def test_the_learned_noise_has_the_largest_likelihood():
    rng = np.random.default_rng(0)
    variance = rng.gamma(2, size=(400, 1))
    residuals = rng.normal(size=(400, 1)) * np.sqrt(variance + 0.7)
    s = learned_noise(residuals, variance)
    # the score equation Σ 1/(v + s) = Σ r²/(v + s)²
    assert np.sum(1 / (variance + s)) == pytest.approx(np.sum(residuals**2 / (variance + s) ** 2), rel=1e-5)
    least = np.sqrt(2 / 400) * np.square(residuals).mean()
    assert learned_noise(residuals, 100 * variance + 100) == pytest.approx(least, rel=1e-5)
    assert learned_noise(residuals, 0 * variance) == pytest.approx(np.square(residuals).mean(), rel=1e-6)


def test_label_noise_has_its_size_and_the_same_numbers_at_every_level():
    x, y = torch.zeros(4000, 1), 3 * torch.randn(4000, 1, generator=torch.Generator().manual_seed(0)).double()
    rows = Labelled(x, y)
    half, one = (with_label_noise(rows, level, rows, "regression", (3, 0)).y - y for level in (0.5, 1.0))
    assert torch.allclose(2 * half, one)
    assert float(one.std()) == pytest.approx(3.0, rel=0.05)
    labels = Labelled(x, torch.arange(4000) % 4)
    few, many = (
        with_label_noise(labels, level, labels, "classification", (3, 0)).y != labels.y for level in (0.2, 0.6)
    )
    assert bool((many | ~few).all())
    assert float(many.double().mean()) == pytest.approx(0.6 * 3 / 4, abs=0.03)


def test_interventions_of_a_linear_model_are_those_of_its_posterior():
    decision = Interventions(sizes=(4, 9), label_noise=(0.0, 1.0))
    found = learner(make(decision))
    arrays = run_decision(found).arrays
    test = features(found.problem.test.batches[0].x)
    for size, value in zip((4, 9), arrays["size_epistemic"], strict=True):
        phi = features(found.start.x[:size])
        covariance = np.linalg.inv(phi.T @ phi / SIGMA**2 + DELTA * np.eye(4))
        assert value == pytest.approx(25 * np.einsum("nd,de,ne->n", test, covariance, test).mean(), rel=1e-9)
    assert arrays["noise_epistemic"] == pytest.approx(np.repeat(arrays["size_epistemic"][-1:], 2), rel=1e-9)
    assert arrays["noise_aleatoric"][0] == arrays["size_aleatoric"][-1]


def test_areas_and_gains_are_means_over_the_rounds():
    curves = {"error": [4.0, 2.0, 1.0], "nll": [1.0, 1.0, 0.0], "network_error": [4.0, 3.0, 2.0]}
    others = {"random_error": [4.0, 3.0, 3.0], "random_nll": [1.0, 1.0, 1.0], "random_network_error": [4.0, 4.0, 4.0]}
    test = {"mean": np.zeros((3, 1)), "total_variance": np.ones((3, 1)), "targets": np.zeros((3, 1))}
    arrays = test | {f"decision/{name}": np.array(values) for name, values in (curves | others).items()}
    found = evaluate("regression", arrays)
    assert next(iter(found)) == "al/area"
    assert found["al/area"] == pytest.approx((4 / 2 + 2 + 1 / 2) / 2)
    assert found["al/gain"] == pytest.approx((4 / 2 + 3 + 3 / 2) / 2 - 2.25)
    assert found["al/NLL-gain"] == pytest.approx(0.25)
    assert found["al/network-gain"] == pytest.approx(1.0)
    assert area(np.array([5.0, 5.0])) == 5
    arrays = test | {"decision/regret": np.array([4.0, 0.0]), "decision/random_regret": np.array([4.0, 2.0])}
    found = evaluate("regression", arrays | {"decision/greedy_regret": np.array([4.0, 4.0])})
    assert [found[f"bo/{n}"] for n in ("area", "regret", "gain", "greedy-gain")] == [2.0, 0.0, 1.0, 2.0]
    levels = {f"decision/{n}_{p}": np.array([2.0, 1.0]) for n in ("size", "noise") for p in ("epistemic", "aleatoric")}
    assert evaluate("regression", test | levels)["dis/epistemic-size"] == pytest.approx(-math.log(2))


def test_options_that_do_not_fit_are_rejected():
    with pytest.raises(OptionError, match="pool of at least 20 rows"):
        make(ActiveLearning(n_rounds=4, n_per_round=5))
    with pytest.raises(OptionError, match="mutual_information"):
        make(ActiveLearning(n_rounds=1, n_per_round=1), kind="classification")
    with pytest.raises(OptionError, match="target is optimised"):
        make(BayesianOptimisation(n_queries=1), kind="classification")
    with pytest.raises(OptionError, match="at most 9"):
        make(Interventions(sizes=(4, 10), label_noise=(0.0, 1.0)))
    with pytest.raises(OptionError, match="at most 1"):
        make(Interventions(sizes=(4, 9), label_noise=(0.0, 2.0)), kind="classification")
    with pytest.raises(OptionError, match="ascending"):
        Interventions(sizes=(9, 4))
    with pytest.raises(OptionError, match="first of them 0"):
        Interventions(label_noise=(0.1, 0.2))
    with pytest.raises(OptionError, match="acquisition among"):
        ActiveLearning(acquisition="bald")
    with pytest.raises(OptionError, match="batch"):
        ActiveLearning(batch="random")
    with pytest.raises(OptionError, match="no members"):
        make(BayesianOptimisation(n_queries=1), members=[linear().eval()])
    rows = [(torch.randn(4, 3).double(), torch.randn(4, 1).double())]
    with pytest.raises(OptionError, match="a decision for the pool"):
        Problem(linear().eval(), "regression", rows, rows, rows, prior_precision=1.0, pool=rows)


def _toy(seed):
    return make(ActiveLearning(n_rounds=2, n_per_round=3), seed)


def test_a_grid_records_decisions_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "toy-decision", Task("toy-decision", "a toy", _toy))
    grid = Grid(["toy-decision"], ["map", "laplace"], [0], tmp_path, tune_budget=1)
    grid.run(lambda _: None)
    store = RecordStore(tmp_path)
    skipped, record = (store.read("toy-decision", m, 0) for m in ("map", "laplace"))
    assert skipped.status == "skipped"
    assert "epistemic variance" in skipped.reason
    assert record.status == "ok", record.reason
    assert record.configuration["train_rows"] == "15"
    assert record.configuration["tuning"].startswith("none")
    assert record.tuned == {}
    curves = store.arrays(record)
    assert curves["decision/labels"].tolist() == [9.0, 12.0, 15.0]
    assert curves["decision/error"][-1] == pytest.approx(record.metrics["reg/RMSE"], rel=1e-12)
    written = store.path("toy-decision", "laplace", 0).stat().st_mtime_ns
    grid.run(lambda _: None)
    assert store.path("toy-decision", "laplace", 0).stat().st_mtime_ns == written
    assert RecordStore(tmp_path).read("toy-decision", "laplace", 0).metrics == record.metrics


MODULE = """
import torch
from torch import nn
from bdl_bench.problem import BayesianOptimisation, Problem
from estimators.training import Recipe

def network():
    return nn.Linear(2, 1).double()

def make(seed):
    g = torch.Generator().manual_seed(seed + 40)
    x = torch.randn(40, 2, generator=g).double()
    y = x.sum(1, keepdim=True) + 0.1 * torch.randn(40, 1, generator=g).double()
    *split, pool = ([(a, b)] for a, b in zip(x.split(10), y.split(10)))
    return Problem(network(), "regression", *split, prior_precision=0.7, recipe=Recipe(epochs=3), make_model=network,
                   pool=pool, decision=BayesianOptimisation(n_queries=4))
"""


def run_and_die(directory, at_fit):
    """Run the grid in a process that is killed in the fit of that number; 0: in none."""
    fitted, n_calls = Learner.fitted, []

    def fit(self, problem):
        n_calls.append(problem)
        if len(n_calls) == at_fit:
            os.kill(os.getpid(), signal.SIGKILL)
        return fitted(self, problem)

    Learner.fitted = fit
    Grid(["small_decision:make"], ["laplace", "last-layer-laplace"], [0], Path(directory)).run(lambda _: None)


def test_a_run_that_is_killed_within_a_loop_is_resumed(fork_server, tmp_path):
    (tmp_path / "small_decision.py").write_text(MODULE)
    codes = []
    for name, at_fit in (("killed", 7), ("killed", 0), ("alone", 0)):  # the third fit of the second method
        fork_server.start(call(run_and_die, str(tmp_path / name), at_fit, cwd=str(tmp_path)))
        codes += fork_server.wait()
    assert codes == [-signal.SIGKILL, 0, 0]
    killed, alone = (RecordStore(tmp_path / name) for name in ("killed", "alone"))
    for record, other in zip(killed.all(), alone.all(), strict=True):
        assert (record.status, record.metrics) == ("ok", other.metrics)
        arrays, others = killed.arrays(record), alone.arrays(other)
        assert all(np.array_equal(array, others[name]) for name, array in arrays.items())
        assert len(arrays["decision/regret"]) == 5


def test_the_report_says_whether_random_queries_are_significantly_worse(tmp_path, monkeypatch):
    kinds = {
        "learn": ActiveLearning(n_rounds=2, n_per_round=3),
        "search": BayesianOptimisation(n_queries=3),
        "change": Interventions(sizes=(4, 9), label_noise=(0.0, 2.0)),
    }
    for name, decision in kinds.items():
        task = Task(name, f"a toy: {name}", lambda seed, decision=decision: make(decision, seed))
        monkeypatch.setitem(TASKS, name, task)
    Grid(list(kinds), ["laplace", "last-layer-laplace-diag"], [0, 1, 2], tmp_path).run(lambda _: None)
    page = write_report(tmp_path).read_text()
    text = (tmp_path / "report.md").read_text()
    for found in (page, text):
        assert "Decisions: active learning" in found
        assert "Random queries are " in found
        assert "greedy queries" in found
        assert "Decisions: interventions on the training set" in found
        assert "expected: falls" in found
    assert "corrected for 2 methods" in text
    assert "aleatoric, more label noise rises: " in text


def test_gains_are_tested_for_all_methods_together():
    found = {"a": mean_interval([1.0, 1.1, 0.9, 1.0]), "b": mean_interval([0.1, -0.2, 0.2, 0.1])}
    assert verdicts(found, "higher") == {"a": "better", "b": "no significant difference"}
    effect = Effect(0.5, 0.4, 0.6, "falls", as_expected=True)
    assert effect_words(effect) == "× 0.500 [0.400, 0.600]"


@pytest.mark.parametrize(
    ("found", "expected", "low", "high", "result"),
    [
        ("falls", "falls", 0.2, 0.4, True),
        ("rises", "falls", 1.2, 1.4, False),
        ("no significant change", "falls", 0.5, 1.4, None),
        ("no significant change", "does not change", 0.6, 1.9, True),
        ("no significant change", "does not change", 0.2, 1.1, None),
        ("rises", "does not change", 1.01, 1.03, True),
        ("falls", "does not change", 0.51, 0.9, True),
        ("falls", "does not change", 0.49, 0.9, False),
        ("rises", "does not change", 1.1, 2.1, False),
        ("not tested", "rises", None, None, None),
    ],
)
def test_a_part_is_unchanged_only_if_that_is_known(found, expected, low, high, result):
    assert as_expected(found, expected, low, high) is result
