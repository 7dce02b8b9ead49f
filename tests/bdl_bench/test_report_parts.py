"""What a report is made of: labels, Pareto fronts, grids, arrays, frames."""

import numpy as np
import pandas as pd
import pytest
from synthetic_records import write_grid

from bdl_bench.records import Tuning
from bdl_bench.report import write_report
from bdl_bench.report.arrays import ArrayView
from bdl_bench.report.figures.labels import short, spread_labels
from bdl_bench.report.formatting import count, join_names
from bdl_bench.report.notebook import Comparison
from bdl_bench.report.palette import Palette, family_of
from bdl_bench.report.sections.cost import MethodPoint, significant_front
from bdl_bench.report.tuning_curves import line, score_grid
from bdl_bench.stats import Comparisons, Interval
from estimators.errors import OptionError, UnsupportedError


def test_labels_are_spread_in_order_a_gap_apart_and_as_near_as_that_allows():
    places = np.array([5.0, 1.0, 1.1, 1.2])
    moved = spread_labels(places, 1.0, 0.0, 10.0)
    assert np.argsort(moved).tolist() == np.argsort(places).tolist()
    assert np.diff(np.sort(moved)) == pytest.approx([1.0, 1.0, 2.9])
    assert np.sort(moved)[:3].mean() == pytest.approx(1.1)


def test_labels_stay_inside_and_closer_than_the_gap_where_there_is_no_room():
    moved = spread_labels(np.full(11, 9.0), 2.0, 0.0, 10.0)
    assert np.sort(moved) == pytest.approx(np.arange(11.0))


def test_a_front_goes_on_only_where_a_dearer_method_is_significantly_better():
    costs = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    points = {m: MethodPoint((c, c, c), Interval(1 / c, None, None, 3)) for m, c in costs.items()}
    pairs = {("a", "b"): "no significant difference", ("a", "c"): "worse", ("c", "d"): "no relevant difference"}
    assert significant_front(points, Comparisons(pairs=pairs)) == ["a", "c"]
    assert significant_front(points, Comparisons()) == ["a"]


@pytest.mark.parametrize(
    ("method", "family"),
    [("map", "single network"), ("laplace-kron", "Laplace"), ("laplace-torch-kron", "laplace-torch"),
     ("last-layer-laplace-diag", "last-layer Laplace"), ("deep-ensemble", "ensembles"), ("swag", "ensembles"),
     ("regvar-finetune", "RegVar"), ("something", "others")],
)  # fmt: skip
def test_a_method_has_the_family_that_its_name_says(method, family):
    assert family_of(method) == family


def test_members_of_a_family_share_a_colour_and_differ_in_dash():
    palette = Palette(["laplace", "map", "laplace-kron"])
    assert palette["laplace"].colour == palette["laplace-kron"].colour != palette["map"].colour
    assert palette["laplace"].dash != palette["laplace-kron"].dash
    assert palette.families(["map", "laplace-kron", "laplace"]) == {
        "single network": ["map"], "Laplace": ["laplace-kron", "laplace"],
    }  # fmt: skip


def trials():
    for value in (0.1, 1.0, 10.0):
        for scale in (0.0, 0.5, 1.0, 2.0):
            for temperature in (0.5, 1.0):
                score = (np.log10(value) - 1) ** 2 + (scale - 0.5) ** 2 + temperature
                yield {"value": value, "variance_scale": scale, "softmax_temperature": temperature, "score": score}


def test_a_score_grid_has_the_best_score_at_each_point_and_no_scale_of_zero():
    tuning = Tuning(option="prior_precision", points=list(trials()), at_boundary=["prior_precision"])
    found = score_grid(tuning)
    assert found.scale.tolist() == [0.5, 1.0, 2.0]
    assert found.selected == (10.0, 0.5)
    assert found.at_boundary
    expected = (np.log10(found.option) - 1)[:, None] ** 2 + (found.scale - 0.5) ** 2 + 0.5
    assert found.score == pytest.approx(expected)


def test_a_line_marks_what_was_chosen_even_between_the_points():
    tuning = Tuning(option="prior_precision", points=list(trials()), chosen={"value": 8.0, "variance_scale": None})
    found = line(tuning, "value")
    assert found.selected == 8.0
    assert not found.at_boundary
    assert found.score == pytest.approx([4.5, 1.5, 0.5])


def test_points_without_a_number_are_left_out_and_too_few_draw_nothing():
    failed = {"value": 5.0, "variance_scale": None, "score": None}
    tuning = Tuning(option="prior_precision", points=[*trials(), failed, {**failed, "score": float("inf")}])
    assert line(tuning, "value").x.tolist() == [0.1, 1.0, 10.0]
    assert line(Tuning(points=[failed]), "value") is None
    assert score_grid(Tuning(points=list(trials())[:9])) is None


def test_the_tuned_part_borrows_targets_and_inputs_and_nothing_else(tmp_path):
    path = tmp_path / "a.npz"
    arrays = {
        "mean": 1,
        "targets": 2,
        "ood/s/mean": 3,
        "ood/s/x": 4,
        "tuned/mean": 5,
        "tuned/ood/s/mean": 6,
        "plot_grid/x": 7,
    }
    np.savez(path, **{name: np.array([float(value)]) for name, value in arrays.items()})
    view = ArrayView.open(path)
    assert {n: a.item() for n, a in view.tuned().items()} == {
        "mean": 5, "targets": 2, "ood/s/mean": 6, "ood/s/x": 4,
    }  # fmt: skip
    assert set(view.untuned()) == {n for n in arrays if not n.startswith("tuned/")}
    assert view.sets("ood") == ["s"]
    assert view.subset("ood/s")["mean"] == 3
    assert "plot_grid/x" not in view.untuned().for_metrics()
    assert view.subset("ood/s").tuned() is None


def test_names_and_counts_are_short():
    assert short("abcdefghijklmnopqrstuvwxyz", 10) == "abcdef…xyz"
    assert join_names(list("abcdefghij"), 3) == "a, b, c and 7 more"
    assert [count(v) for v in (None, 3.0, 3.25, 1234.5)] == ["–", "3", "3.2", "1,234"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    directory = tmp_path_factory.mktemp("small")
    write_grid(directory, methods=("map", "laplace"), tasks={"between": "regression"}, seeds=2, rows=30)
    return directory


def test_the_frame_is_long_and_equal_to_the_parquet_file(small):
    comparison = Comparison(small)
    frame = comparison.to_frame()
    assert list(frame.columns) == ["task", "method", "seed", "variant", "quantity", "value"]
    assert not frame.duplicated(["task", "method", "seed", "variant", "quantity"]).any()
    assert set(frame.variant) == {"untuned", "tuned"}
    assert comparison.report == small / "report.html"
    pd.testing.assert_frame_equal(frame, pd.read_parquet(small / "report.parquet"))


def test_a_metric_that_the_record_never_had_is_in_the_frame(small):
    comparison = Comparison(small)
    assert all(record.metrics == {} for record in comparison.records)
    rows = comparison.to_frame().query("quantity == 'reg/RMSE' and method == 'map' and variant == 'untuned'")
    arrays = np.load(small / comparison.records[-1].arrays)
    expected = np.sqrt(np.square(arrays["mean"] - arrays["targets"]).mean())
    assert rows.value.tolist()[-1] == pytest.approx(expected)


def test_in_a_notebook_the_page_is_shown_in_a_sandbox(small):
    shown = Comparison(small)._repr_html_()
    assert shown.startswith('<iframe srcdoc="&lt;!doctype html&gt;')
    assert 'sandbox="allow-scripts"' in shown
    assert "allow-same-origin" not in shown
    assert "<script" not in shown
    assert repr(Comparison(small)).endswith(": 4 ok)")


def test_without_pandas_the_frame_says_what_to_install(small, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(UnsupportedError, match=r"bdl-bench\[notebook\]"):
        Comparison(small).to_frame()


@pytest.mark.parametrize("form", ["svg", "pdf"])
def test_every_figure_is_a_file_on_request(small, form, tmp_path):
    target = tmp_path / "copy"
    target.mkdir()
    (target / "records").symlink_to(small / "records")
    page = write_report(target, figures=form)
    files = list((target / "figures").rglob(f"*.{form}"))
    assert len(files) == page.read_text().count("<img ")
    start = {"svg": b"<?xml", "pdf": b"%PDF"}[form]
    assert all(file.read_bytes().startswith(start) for file in files)
    assert not list((target / "figures").rglob("*.part"))


def test_another_format_of_figures_raises(small):
    with pytest.raises(OptionError, match="svg"):
        write_report(small, figures="png")
