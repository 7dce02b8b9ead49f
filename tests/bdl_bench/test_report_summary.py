"""The head of the report: the recommendation, effects over tasks, folded columns, relevant differences."""

import itertools
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats as reference

from bdl_bench.metrics import METRICS, Metric
from bdl_bench.records import Record, RecordStore
from bdl_bench.records.record import OwnMetric
from bdl_bench.report import write_report
from bdl_bench.report.figures.labels import main_range
from bdl_bench.report.findings import comparison_with_best
from bdl_bench.report.formatting import effect, mean_of
from bdl_bench.report.html import by_reason, columns
from bdl_bench.report.overall import Overall
from bdl_bench.report.recommendation import Evidence, recommendation
from bdl_bench.report.results import group_by_task, load_records
from bdl_bench.report.scores import ScoreEntry, ScoreTable
from bdl_bench.report.sections.configuration import Configuration
from bdl_bench.report.seed_design import SeedDesign
from bdl_bench.report.selection import Selection
from bdl_bench.report.single_tasks import on_single_tasks
from bdl_bench.report.view import build
from bdl_bench.stats import Comparisons, Interval, compare_methods, mean_interval, mean_over_tasks, verdicts

NLL = METRICS["regression"][0]


def interval(mean, half=0.01, n=5):
    return Interval(mean, mean - half, mean + half, n, 0.001 if abs(mean) > half else 0.5, half / 2.8, [(1.0, n - 1.0)])


def found_with(against, pairs, means, *, n_seeds=5):
    """An overall comparison with these verdicts against map and between pairs."""
    tests = Comparisons(
        {m: verdict for m, (_, verdict) in against.items()}, pairs, {m: interval(d) for m, (d, _) in against.items()}
    )
    return Overall(["a", "b"], NLL, True, means, tests, 0.01, n_seeds)


def evidence(**seconds):
    return Evidence(seconds, {"laplace", "ensemble"}, {}, [])


def test_the_mean_over_tasks_is_that_of_independent_estimates():
    rng = np.random.default_rng(0)
    tasks = [rng.normal(size=4), 3 * rng.normal(size=6)]
    found = mean_over_tasks([mean_interval(list(values)) for values in tasks])
    errors = [values.std(ddof=1) / np.sqrt(len(values)) for values in tasks]
    assert found.mean == pytest.approx((tasks[0].mean() + tasks[1].mean()) / 2)
    assert found.standard_error == pytest.approx(np.hypot(*errors) / 2)
    shares = np.square(errors) / np.square(errors).sum()
    quantiles = [reference.t.ppf(0.975, len(values) - 1) for values in tasks]
    assert found.half_width == pytest.approx(np.sqrt(shares @ np.square(quantiles)) * np.hypot(*errors) / 2)
    assert found.n == 4


def test_a_task_without_an_interval_leaves_the_mean_without_one():
    found = mean_over_tasks([mean_interval([1.0, 2.0]), mean_interval([4.0])])
    assert (found.mean, found.low, found.p_value) == (2.75, None, None)


def test_a_significant_difference_below_the_smallest_relevant_one_is_no_difference():
    noise = 1e-7 * np.random.default_rng(0).normal(size=8)
    values = {"a": np.full(8, 0.0960753), "b": 0.0960759 + noise}
    arrays = {m: {s: np.array([v]) for s, v in enumerate(found)} for m, found in values.items()}
    for smallest, verdict in ((0.0, "better"), (NLL.smallest_relevant(0.096), "no relevant difference")):
        tests = compare_methods(arrays, "lower", same_rows=False, baseline="b", smallest_relevant=smallest)
        assert tests.with_baseline == {"a": verdict}
        assert tests.difference("b", "a").mean == pytest.approx(6e-7 + noise.mean())
    assert verdicts({"x": interval(-0.5)}, "lower", smallest_relevant=0.5) == {"x": "better"}


def test_the_smallest_relevant_difference_is_in_the_unit_of_the_metric():
    by_key = {metric.key: metric for kind in METRICS.values() for metric in kind}
    assert by_key["reg/NLL"].smallest_relevant(-3.0) == by_key["cls/NLL*"].smallest_relevant(9.0) == 0.01
    assert by_key["cls/Acc"].smallest_relevant(0.9) == by_key["cal/ECE"].smallest_relevant(0.05) == 0.001
    assert by_key["reg/RMSE"].smallest_relevant(-50.0) == by_key["sc/AUSE"].smallest_relevant(50.0) == 0.5
    assert Metric("my/MAE", "MAE", "", "lower", relevant=0.2).smallest_relevant(50.0) == 0.2


def test_the_cheapest_of_the_methods_that_beat_the_baseline_and_are_not_worse_than_the_best_is_recommended():
    against = {"ensemble": (-0.2, "better"), "laplace": (-0.15, "better"), "dropout": (0.3, "worse")}
    pairs = {
        ("ensemble", "laplace"): "no significant difference", ("ensemble", "dropout"): "better",
        ("map", "ensemble"): "worse", ("map", "laplace"): "worse", ("map", "dropout"): "better",
        ("laplace", "dropout"): "better",
    }  # fmt: skip
    means = {"ensemble": 0.3, "laplace": 0.35, "map": 0.5, "dropout": 0.8}
    found = recommendation(found_with(against, pairs, means), evidence(ensemble=9.0, laplace=1.0, map=0.1, dropout=0.2))
    assert (found.method, found.headline) == ("laplace", "Use laplace.")
    assert "0.150 ± 0.010 nats lower than that of map" in found.reason
    assert "cheapest of the 2 methods" in found.reason
    dearer = recommendation(found_with(against, pairs, means), evidence(ensemble=0.5, laplace=1.0, map=0.1))
    assert dearer.method == "ensemble"


def test_the_baseline_is_kept_if_nothing_is_shown_to_be_better_and_a_method_with_a_variance_is_named():
    against = {"ensemble": (-0.005, "no significant difference"), "laplace": (0.002, "no significant difference")}
    pairs = {("map", "ensemble"): "no significant difference", ("map", "laplace"): "no significant difference",
             ("ensemble", "laplace"): "no significant difference"}  # fmt: skip
    found = recommendation(
        found_with(against, pairs, {"ensemble": 0.3, "map": 0.305, "laplace": 0.307}),
        evidence(ensemble=9.0, laplace=1.0, map=0.1),
    )
    assert (found.method, found.headline) == ("map", "Keep map.")
    assert "which is not significant after the correction for 2 tests" in found.reason
    assert "laplace, not significantly worse" in found.reason
    assert "more seeds (--seeds 10) find smaller ones" in found.reason
    best = next(answer.text for answer in found.answers if answer.question == "Predicts best")
    assert best.startswith("ensemble: mean NLL over 2 tasks 0.300")
    assert best.endswith("No other method is significantly worse than it.")


def test_with_a_sampled_posterior_the_nearest_method_is_named_for_a_variance_and_the_nearest_quick_one():
    names = ("ensemble", "laplace", "swag")
    against = dict.fromkeys(names, (0.001, "no significant difference"))
    all_methods = ("map", *names)
    pairs = {pair: "no significant difference" for pair in itertools.combinations(all_methods, 2)}
    means = {"map": 0.3, "ensemble": 0.301, "laplace": 0.302, "swag": 0.303}

    def reason(swag_rank=2.0, **seconds):
        ranks = {"ensemble": 1.0, "laplace": 3.0, "swag": swag_rank, "map": 4.0}
        found = Evidence({"map": 0.1, **seconds}, {"laplace", "swag", "ensemble"}, ranks, ["wine"])
        return recommendation(found_with(against, pairs, means), found).reason

    nearest = "ensemble is the nearest to the posterior of the methods that are not significantly worse than the best"
    assert f"{nearest}." in reason(ensemble=9.0, laplace=1.0, swag=20.0)
    several = reason(ensemble=90.0, laplace=1.0, swag=9.0)
    assert f"{nearest} (90 s); swag (9 s) is the nearest of those that take at most 10 times as long" in several
    assert "swag is the nearest to the posterior of" in reason(swag_rank=1.0, ensemble=90.0, laplace=1.0, swag=9.0)


def test_all_methods_are_only_called_equal_if_every_pair_was_tested():
    against = {"laplace": (0.002, "no significant difference"), "swag": (0.001, "unknown")}
    pairs = {
        ("map", "laplace"): "no significant difference",
        ("map", "swag"): "unknown",
        ("laplace", "swag"): "unknown",
    }
    found = recommendation(found_with(against, pairs, {"map": 0.3, "swag": 0.301, "laplace": 0.302}), evidence(map=1.0))
    best = next(answer.text for answer in found.answers if answer.question == "Predicts best")
    assert "No other method" not in best
    assert best.endswith("Some pairs could not be tested.")


POSTERIOR = "reference-posterior"
WORSE, SAME, BETTER = "worse", "no significant difference", "better"


@pytest.mark.parametrize(
    ("dropout", "laplace", "headline", "reason"),
    [
        (SAME, SAME, "Keep map.", "of laplace, is 0.200 ± 0.010 nats lower than that of map, which is not significant"),
        (WORSE, WORSE, "Use laplace.", "Its mean NLL over 2 tasks is 0.200 ± 0.010 nats lower than that of map."),
        (SAME, WORSE, "Use laplace.", "It has the best mean"),
    ],
)
def test_the_sampled_posterior_is_named_as_best_but_not_recommended(dropout, laplace, headline, reason):
    """`dropout` and `laplace` are the verdicts on them against the posterior, which is better than map."""
    of_laplace = SAME if laplace == SAME else BETTER
    against = {"dropout": (-0.1, SAME), "laplace": (-0.2, of_laplace), POSTERIOR: (-0.5, BETTER)}
    pairs = {("map", POSTERIOR): WORSE, ("dropout", POSTERIOR): dropout, ("laplace", POSTERIOR): laplace,
             ("map", "dropout"): SAME, ("map", "laplace"): of_laplace.replace(BETTER, WORSE),
             ("dropout", "laplace"): SAME}  # fmt: skip
    found = recommendation(
        found_with(against, pairs, {POSTERIOR: 0.5, "laplace": 0.8, "dropout": 0.9, "map": 1.0}),
        evidence(map=1.0, laplace=2.0, dropout=3.0, **{POSTERIOR: 0.5}),
    )
    assert found.headline == headline
    assert reason in found.reason
    assert "all others" not in found.reason
    answers = {answer.question: answer.text for answer in found.answers}
    best = f"{POSTERIOR} (a reference, not a method to use): mean NLL over 2 tasks 0.500, 0.500 ± 0.010 nats lower"
    assert answers["Predicts best"].startswith(best)
    assert POSTERIOR not in answers["Cost"]


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (SAME, "which is not significant."),
        ("no relevant difference", "which is too small to be relevant."),
        ("unknown", "which was not tested."),
    ],
)
def test_the_baseline_is_kept_in_the_words_of_the_verdict(verdict, words):
    found = recommendation(
        found_with({"laplace": (-0.2, verdict)}, {("map", "laplace"): verdict}, {"laplace": 0.8, "map": 1.0}),
        evidence(map=1.0),
    )
    assert found.headline == "Keep map."
    assert words in found.reason


def test_a_baseline_beside_the_posterior_alone_is_kept():
    found = recommendation(
        found_with({POSTERIOR: (-0.2, BETTER)}, {("map", POSTERIOR): WORSE}, {POSTERIOR: 0.8, "map": 1.0}), evidence()
    )
    assert (found.headline, found.reason.partition(".")[0]) == ("Keep map.", "No other method was compared")


def test_a_better_method_that_misses_a_seed_is_named_and_not_among_the_others():
    pairs = {("laplace", "map"): BETTER, ("laplace", "swag"): BETTER, ("laplace", "ensemble"): WORSE}
    entries = {
        m: {NLL.key: ScoreEntry(interval(mean), None, False)}
        for m, mean in {"map": 1.0, "laplace": 0.5, "swag": 0.9, "ensemble": 0.3}.items()
    }
    table = ScoreTable((NLL,), entries, {NLL.key: "laplace"}, tests={NLL.key: Comparisons({}, pairs)})
    design = SeedDesign([0, 1, 2, 3, 4], [9] * 5)
    assert comparison_with_best(table, design) == (
        "; all other methods that finished every seed are significantly worse; "
        "better over the seeds that it has: ensemble"
    )
    del pairs["laplace", "ensemble"], entries["ensemble"]
    assert comparison_with_best(table, design) == "; all others are significantly worse"


def test_a_recommendation_names_the_methods_that_it_leaves_out():
    against = {"laplace": (-0.2, BETTER)}
    found = found_with(against, {("map", "laplace"): WORSE}, {"laplace": 0.8, "map": 1.0})
    complete = recommendation(found, evidence())
    partial = recommendation(replace(found, left_out=["ensemble", POSTERIOR]), evidence())
    assert complete.reason.endswith("It has the best mean; all others are significantly worse.")
    assert "all other methods that finished every seed are significantly worse" in partial.reason
    assert partial.reason.endswith("missing tasks or seeds, or values that are not finite: ensemble.")
    best = next(answer.text for answer in partial.answers if answer.question == "Predicts best")
    assert best.endswith("All other methods that finished every seed are significantly worse.")


def test_a_method_that_misses_a_seed_or_a_task_is_left_out_of_the_means_over_tasks(write_record, tmp_path):
    for task, seed in itertools.product("ab", range(3)):
        for method in ("map", "laplace", *(["ensemble"] * (seed > 0)), *(["swag"] * (task == "a"))):
            write_record(task, method, seed, scale=0.1 * len(method))
    found = build(tmp_path).summary.overall
    assert (sorted(found.means), sorted(found.left_out)) == (["laplace", "map"], ["ensemble", "swag"])
    assert found.missing_tasks == {"ensemble": ["a", "b"], "swag": ["b"]}
    assert "not finite: ensemble (a, b), swag (b)." in build(tmp_path).summary.recommendation.reason
    assert found.without("swag").left_out == ["ensemble"]


def test_more_seeds_are_advised_than_there_are():
    against, pairs = {"laplace": (-0.005, SAME)}, {("map", "laplace"): SAME}
    found = found_with(against, pairs, {"laplace": 0.3, "map": 0.305}, n_seeds=20)
    reason = recommendation(found, evidence(map=1.0)).reason
    assert "more seeds (--seeds 40) find smaller ones" in reason
    assert "does not have: laplace, with the best mean." in reason


@pytest.mark.parametrize(
    ("copied", "advice"),
    [(True, "check whether the problem uses its seed."), (False, "Run again with --seeds 5 or more.")],
)
def test_seeds_that_are_copies_are_not_advised_to_be_more(write_record, tmp_path, copied, advice):
    store = RecordStore(tmp_path)
    for seed, method in itertools.product(range(4 if copied else 2), ("map", "laplace")):
        record = write_record("a", method, seed, scale=0.1 * len(method))
        if copied:
            store.write(record, store.arrays(store.read("a", method, 0)))
    found = build(tmp_path).summary
    assert (found.overall.n_seeds, found.overall.has_copies) == (1 if copied else 2, copied)
    assert found.recommendation.reason.endswith(advice)


@pytest.mark.parametrize(("seeds", "words"), [({"a": 3, "b": 1}, "1 distinct seed of b cannot be tested. "),
                                               ({"a": 1, "b": 1}, "1 distinct seed cannot be tested. ")])  # fmt: skip
def test_the_task_with_too_few_seeds_is_named(write_record, tmp_path, seeds, words):
    for task, n in seeds.items():
        for seed, method in itertools.product(range(n), ("map", "laplace")):
            write_record(task, method, seed, scale=0.1 * len(method))
    assert build(tmp_path).summary.recommendation.reason.startswith(words)


def test_a_recommendation_says_for_which_tasks_it_is_if_not_for_all(write_record, tmp_path):
    for seed, method in itertools.product(range(3), ("laplace", "ensemble", "map")):
        for task, kind in (("c", "classification"), ("r", "regression")):
            write_record(task, method, seed, kind=kind, scale=0.2 * len(method))
    found = build(tmp_path, selection=Selection(metrics=("Accuracy", "RMSE"))).summary
    assert found.overall.scope == "on task c"
    assert "mean Accuracy on task c" in found.recommendation.reason
    without = build(
        tmp_path, selection=Selection(metrics=("Accuracy", "RMSE"), methods=("laplace", "ensemble"))
    ).summary
    assert "mean Accuracy on task c" in without.recommendation.reason


@pytest.mark.parametrize(
    ("tasks", "n", "scope"),
    [("c", 1, ""), ("c", 2, "on task c"), ("ab", 2, "over 2 tasks"), ("ab", 3, "over 2 tasks (a, b)")],
)
def test_a_mean_is_over_all_tasks_or_names_them(tasks, n, scope):
    found = found_with({"laplace": (0.1, SAME)}, {("map", "laplace"): SAME}, {"map": 0.3, "laplace": 0.4})
    assert replace(found, tasks=list(tasks), n_all_tasks=n).scope == scope


def test_a_mean_is_said_once():
    regret = replace(NLL, label="mean regret")
    found = found_with({"laplace": (0.1, SAME)}, {("map", "laplace"): SAME}, {"map": 0.3, "laplace": 0.4})
    answers = recommendation(replace(found, metric=regret), evidence()).answers
    assert answers[0].text.startswith("map: mean regret over 2 tasks 0.300")
    assert [mean_of("mean regret"), mean_of("NLL")] == ["mean regret", "mean NLL"]


def test_methods_are_not_ranked_by_a_metric_of_which_neither_direction_is_better(write_record, tmp_path):
    for task, method in itertools.product("ab", ("map", "laplace", "ensemble")):
        write_record(task, method, 0, scale=0.1 * len(method))
    assert build(tmp_path, selection=Selection(metrics=("reg/NLL",))).summary.ranking is not None
    assert build(tmp_path, selection=Selection(metrics=("cov/90",))).summary.ranking is None


@pytest.mark.parametrize("kept", [2, 0])
def test_a_value_that_is_not_finite_is_never_best_and_has_no_rank(write_record, tmp_path, kept):
    """`kept` methods have a finite value of a plugin's metric, which comes first."""
    methods, store = ("map", "laplace", "ensemble", "swag", "dropout"), RecordStore(tmp_path)
    for task, seed, (i, method) in itertools.product("ab", range(3), enumerate(methods)):
        record = write_record(task, method, seed, scale=0.1 * i)
        value = i + 0.1 * seed if i >= 5 - kept else (np.nan, np.inf)[i % 2]
        found = {"metrics": record.metrics | {"my/x": value}}
        own = {"own_metrics": {"my/x": OwnMetric(label="X", reading="", better="lower", relevant=0.1)}}
        store.write(record.model_copy(update=found | own), store.arrays(record))
    report = build(tmp_path, selection=Selection(metrics=("my/x", "NLL")))
    assert report.tasks[0].scores.untuned.best.get("my/x") == ("swag" if kept else None)
    assert report.summary.sentences[-1].startswith("b, X untuned: best mean swag" if kept else "b: X has no best value")
    assert report.summary.ranking is None, "fewer than three methods have finite values"
    left_out = report.summary.overall.left_out if kept else report.summary.overall
    assert left_out == (["map", "ensemble", "laplace"] if kept else None)


def test_too_few_seeds_recommend_nothing():
    found = recommendation(
        found_with({"laplace": (-1.0, "unknown")}, {}, {"laplace": 1.0, "map": 2.0}, n_seeds=2), evidence()
    )
    assert found.method is None
    assert "--seeds" in found.reason


def test_the_head_of_a_page_has_the_effect_on_the_mean_over_tasks(write_record, tmp_path):
    for task in ("a", "b"):
        for seed in range(4):
            write_record(task, "map", seed, scale=0.0)
            write_record(task, "laplace", seed, scale=0.4)
    summary = build(tmp_path).summary
    results = {r.name: r for r in group_by_task(RecordStore(tmp_path), load_records(RecordStore(tmp_path)))}
    differences = [
        mean_interval([a - b for a, b in zip(r.values("laplace", NLL.key), r.values("map", NLL.key), strict=True)])
        for r in results.values()
    ]
    expected = mean_over_tasks(differences)
    effect = next(row.effect for row in summary.rows if row.method == "laplace")
    assert (effect.mean, effect.half_width) == pytest.approx((expected.mean, expected.half_width))
    assert summary.effects is not None
    assert summary.picture is None, "ranks of two tasks are not tested"
    assert summary.recommendation.method in ("map", "laplace")


def test_an_effect_has_one_digit_more_than_the_smallest_relevant_difference():
    assert effect(Interval(-1.7e-7, -0.0123, 0.0123, 3), 0.01) == ("0.000", "± 0.012")
    assert effect(Interval(-0.0364, None, None, 1), 0.01) == ("−0.036", "")
    assert effect(Interval(1234.5, 1204.5, 1264.5, 3), 50.0) == ("1234", "± 30")


def test_an_effect_that_is_relevant_is_never_rounded_to_zero():
    tiny = Interval(-2e-5, -3e-5, -1e-5, 5)
    assert effect(tiny, 7e-6) == effect(tiny, 0.0) == ("−2.0e−05", "± 1.0e−05")
    assert effect(Interval(-2e-5, None, None, 1), 7e-6) == ("−2.0e−05", "")
    assert effect(Interval(-2e-5, -0.01, 0.01, 5), 7e-6) == ("0.0000", "± 0.0100")
    assert effect(tiny, 0.01) == ("0.000", "± 0.000"), "a difference that is not relevant"
    assert effect(Interval(0.0, 0.0, 0.0, 5), 0.0) == ("0.000", "± 0.000")


def test_a_method_that_failed_does_not_set_the_range_of_a_figure():
    assert main_range([0.1, 0.2, 0.3, 0.25, 7417.0]) == (0.1, 0.3)
    assert main_range([-0.06, -0.01, 0.0, 0.0, 0.3]) == (-0.06, 0.0)
    assert main_range([2.0, 2.0]) == (2.0, 2.0)


def test_columns_that_say_nothing_are_left_out_and_named():
    keys = ("cls/NLL", "cls/NLL*", "cls/Acc", "cls/Brier", "my/x")
    metrics = tuple(Metric(key, key.rpartition("/")[2], "", "lower") for key in keys)
    values = {"a": (0.3, 0.3, 0.9, 0.2, 1.0), "b": (0.4, 0.4, 0.9, 0.1, 1.0)}
    entries = {
        m: {key: ScoreEntry(Interval(v, None, None, 3), None, False) for key, v in zip(keys, row, strict=True)}
        for m, row in values.items()
    }
    table = ScoreTable(metrics, entries, {})
    assert [metric.label for metric in table.shown("cls/", "my/")] == ["NLL", "Brier", "x"]
    assert table.folded("cls/") == {"cls/NLL*": "NLL* equals NLL", "cls/Acc": "Acc is 0.900 for every method"}
    assert [metric.key for metric in table.columns("cls/NLL")] == ["cls/NLL"], "a key is no beginning of another one"
    assert [metric.key for metric in table.columns("c", "m", "my/x")] == ["my/x"]
    alone = ScoreTable(metrics, {"a": entries["a"]}, {})
    assert alone.folded("cls/") == {}


@pytest.mark.parametrize("kind", ["small", "middle", "broad"])
def test_the_last_row_of_a_grid_of_figures_is_as_full_as_it_can_be(kind):
    choices = {"small": (4, 5, 6), "middle": (3, 4), "broad": (2, 3)}[kind]
    for n in range(max(choices), 40):
        assert -n % columns(n, kind) == min(-n % c for c in choices)


def test_runs_with_one_reason_are_one_row():
    base = {"key": "k", "task": "t", "task_summary": "", "method_summary": "", "status": "skipped"}
    records = [Record(**base, method=m, seed=s, reason=r) for m, s, r in (("a", 0, "x"), ("a", 1, "x"), ("a", 2, "y"))]
    assert [(r.reason, seeds) for r, seeds in by_reason(records)] == [("x", [0, 1]), ("y", [2])]


def test_ok_diagnostics_are_counted_and_a_warning_has_its_remedy():
    preflight = {
        "weights": {"ok: finite": ""},
        "gradient": {"note: 0.2; try: --converged-map": "seed 0", "ok: 0": "seed 1"},
        "overlap": {"warning: 3 rows; try: remove them": ""},
    }
    found = Configuration("t", {}, "", {}, preflight)
    assert (found.n_ok, found.n_warnings) == (1, 1)
    assert list(found.noted) == ["overlap", "gradient"]
    (finding,) = found.noted["overlap"]
    assert (finding.level, finding.measured, finding.remedy) == ("warning", "3 rows", "remove them")
    assert [f.seeds for f in found.noted["gradient"]] == ["seed 0"]


def single_tasks(build_tables):
    return on_single_tasks([SimpleNamespace(name=n, scores=s) for n, s in build_tables.items()])


def scores_with(*, better="lower", **verdicts):
    """Scores of a task: a verdict against the baseline by method, the first with mean 1, the second with 2, ..."""
    metric = replace(NLL, better=better)
    entries = {"map": {metric.key: ScoreEntry(interval(0.0), None, False)}}
    for mean, (method, verdict) in enumerate(verdicts.items(), start=1):
        entries[method] = {metric.key: ScoreEntry(interval(float(mean)), verdict, False)}
    return SimpleNamespace(first=metric, compared=ScoreTable((metric,), entries, {}))


def test_methods_that_differ_from_the_baseline_on_single_tasks_are_named_with_the_best_first():
    tables = {
        "a": scores_with(laplace="better", swag="worse", dropout="better"),
        "b": scores_with(better="higher", laplace="better", swag="no significant difference", dropout="better"),
        "c": scores_with(laplace="no relevant difference"),
    }
    assert single_tasks(tables).text == (
        "Significantly better than map: laplace, dropout on a; dropout, laplace on b. "
        "Significantly worse than map: swag on a."
    )
    assert single_tasks({"c": tables["c"], "d": tables["c"]}).text == "No significant difference from map."
    unknown = scores_with(laplace="unknown")
    assert single_tasks({"a": unknown, "c": tables["c"]}).text.endswith("from map on those that were tested.")
    assert single_tasks({"a": unknown, "b": unknown}) is None
    assert single_tasks({"a": tables["a"]}) is None


@pytest.mark.parametrize(("n", "sizes"), [(1, [1]), (6, [6]), (7, [3, 4]), (10, [5, 5]), (13, [4, 4, 5])])
def test_the_table_of_all_tasks_is_divided_where_it_would_be_wider_than_the_page(write_record, tmp_path, n, sizes):
    for i, method in itertools.product(range(n), ("map", "laplace")):
        write_record(f"t{i:02d}", method, 0)
    blocks = build(tmp_path).summary.column_blocks()
    assert [len(block) for block in blocks] == sizes
    assert list(itertools.chain(*blocks)) == list(range(n))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    tables = re.findall(r"<caption>All methods on (.*?)</caption>.*?</table>", page, flags=re.DOTALL)
    assert tables == (["all tasks"] if n < 7 else [f"t{b[0]:02d} to t{b[-1]:02d}" for b in blocks])
