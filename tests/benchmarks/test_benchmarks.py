"""The benchmarks: what they measure, record and write; nothing is asserted of times."""

import json

import pytest
import torch

from bdl_bench.networks.resnet import resnet18
from bdl_bench.networks.small import mlp
from benchmarks import pages, run
from benchmarks.__main__ import main
from benchmarks.clock import Timing, interleaved
from benchmarks.core import measure as core_measure
from benchmarks.core import page as core_page
from benchmarks.core.measure import ROWS
from benchmarks.core.work import Work
from benchmarks.fisher import page as fisher_page
from benchmarks.fresh import in_fresh_process
from benchmarks.large import page as large_page
from benchmarks.markdown import verdict
from benchmarks.networks import VisionTransformer, convolutional
from benchmarks.regvar import page as regvar_page
from estimators import LastLayerLaplace
from estimators.errors import OptionError

MIB = 2**20


def test_the_peak_of_a_fresh_process_is_that_of_its_function_alone():
    expression = f"len(bytearray(b'x') * {256 * MIB})"  # a builtin: the new process need not find this module
    result, peak = in_fresh_process(eval, expression)
    assert result == 256 * MIB
    assert 250 * MIB <= peak <= 320 * MIB  # what the imports freed is used first, so a little less may show


def test_methods_take_turns_and_wide_spreads_are_measured_again():
    order = []

    def method(name, seconds):
        def once():
            order.append(name)
            return [next(seconds)]

        return once

    steady = interleaved([method("a", iter([1.0] * 6)), method("b", iter([2.0] * 6))])
    assert order == ["a", "b"] * 3
    assert [timing.median for (timing,) in steady] == [1.0, 2.0]
    (wide,) = interleaved([method("c", iter([1.0, 2.0, 3.0, 1.0, 1.0, 1.1]))])
    assert wide == [Timing((1.0, 2.0, 3.0, 1.0, 1.0, 1.1))]


def test_a_goal_is_reached_from_the_side_it_names():
    assert verdict(2.5, 2)[1] == verdict(0.5, 1, at_most=True)[1] == "reached"
    assert verdict(1.5, 2)[1] == verdict(2, 1, at_most=True)[1] == "**missed**"
    assert verdict(1.0, None) == ("–", "–")


@pytest.mark.parametrize(
    ("network", "shape", "n_parameters"),
    [
        (lambda: mlp(64, 40, 10), (64,), 3_010),
        (lambda: mlp(64, 152, 1), (64,), 10_033),
        (lambda: mlp(64, 455, 1), (64,), 30_031),
        (convolutional, (3, 32, 32), 951_691),
        (resnet18, (3, 32, 32), 11_181_642),
        (VisionTransformer, (3, 32, 32), 5_381_194),
    ],
)
def test_the_networks_have_the_sizes_that_the_pages_name(network, shape, n_parameters):
    model = network().eval()
    assert sum(p.numel() for p in model.parameters()) == n_parameters
    assert model(torch.randn(2, *shape)).shape[0] == 2


@pytest.fixture
def small_row(monkeypatch):
    """A row that takes a moment, measured in this process."""
    work = Work(
        "last layer diag, small",
        lambda: mlp(4, 5, 3),
        (4,),
        lambda model: LastLayerLaplace(model, "classification", hessian_structure="diag"),
        {"subset_of_weights": "last_layer", "hessian_structure": "diag"},
        goals={"fit + first variance": 1e-9},
        queries=6,
        their_queries=2,
        peak_goal=2**30,
    )
    monkeypatch.setitem(ROWS, "small", work)
    monkeypatch.setattr(core_measure, "in_fresh_process", lambda function, *arguments: (function(*arguments), MIB))
    return "small"


def test_a_row_has_the_numbers_of_laplace_torch_and_a_line_for_each_step(small_row):
    measured = json.loads(json.dumps(core_measure.measure(small_row)))
    assert max(measured["difference"].values()) < 1e-4
    assert measured["error"] < 1e-5
    page = core_page.to_markdown({small_row: measured})
    assert page.count("| last layer diag, small |") == 5  # three steps, one sum with a goal, one line of memory
    assert "| fit + first variance |" in page
    assert "reached" in page
    assert "for 2 of 6 queries" in page


def test_what_laplace_torch_cannot_hold_is_told_by_size_and_not_run(small_row, monkeypatch):
    work = ROWS[small_row]
    monkeypatch.setitem(ROWS, small_row, Work(**{**vars(work), "their_bytes": 3 * 2**30, "their_queries": None}))
    monkeypatch.setattr(core_measure, "fastest", None)
    page = core_page.to_markdown({small_row: core_measure.measure(small_row)})
    assert "out of memory" in page
    assert "3.00 by size" in page


def test_a_row_is_recorded_and_its_page_keeps_the_others(tmp_path, monkeypatch):
    counted = iter(range(9))
    rows = {name: lambda: {"value": next(counted)} for name in ("one", "two")}
    page = pages.Page(rows, lambda found: "\n".join(f"{name} {row['value']}" for name, row in found.items()))
    monkeypatch.setattr(run, "PAGES", {"page": page})
    assert run.run_bench([], tmp_path) == [tmp_path / "page.md"]
    assert (tmp_path / "page.md").read_text() == "one 0\ntwo 1"
    run.run_bench(["one"], tmp_path)
    assert (tmp_path / "page.md").read_text() == "one 2\ntwo 1"


def test_large_networks_are_measured_only_where_they_are_asked_for():
    assert {page for page, _ in run._selected([])} == {"core", "regvar"}
    assert {page for page, _ in run._selected(["large"])} == {"large"}
    assert run._selected(["resnet18-kron"]) == [("large", "resnet18-kron")]


def test_an_unknown_row_raises_and_names_the_rows(tmp_path):
    with pytest.raises(OptionError, match="full-3k"):
        run.run_bench(["fastest"], tmp_path)
    assert main(["--select", "fastest", "--out", str(tmp_path)]) == 2


def test_the_page_of_large_networks_compares_with_the_reference():
    method = {
        "n_parameters": 5,
        "fit_seconds": 1.0,
        "variance_seconds": 1.0,
        "peak": 2**33 + 1,
        "variance": [[1.0, 2.0], [3.0, 4.0]],
    }
    pointwise = {**method, "variance": [[1.0], [4.0]], "passes": 30.2}
    reference = {"classes": [0, 1], "variance": [1.05, 4.0], "products": 7, "seconds": 3.0, "peak": 1}
    reference |= {"guess_residuals": [1e-9, 2e-9, 0.0], "guess_seconds": 2.0}
    rows = {"resnet18-linear-response": {**method, "energy": 0.618}, "resnet18-kron": method}
    rows |= {"resnet18-auto": {**method, "stated": 0.01}, "resnet18-fine-tune": {**method, "stated": 0.02}}
    rows |= {"resnet18-reference": reference, "resnet18-pointwise": pointwise}
    assert large_page.largest_error(method, reference) == pytest.approx(0.05 / 1.05)
    page = large_page.to_markdown(rows)
    assert large_page.largest_error(pointwise, reference) == pytest.approx(0.05 / 1.05)
    assert "| – | 0.62 | 8.00 | ≤ 8 | **missed** | 0.048 | ≤ 1.5 | reached |" in page
    assert "| 30 | – | 8.00 | ≤ 8 | **missed** | 0.048 | ≤ 0.1 | reached |" in page
    assert "| – | – | 8.00 | – | – | 0.048 | – | – | 0.034 | – | – | – |" in page
    assert "| 0.048 | ≤ 1.5 | reached | 0.034 | 0.010 | ≤ 0.02 | **missed** |" in page
    assert "| 0.034 | 0.020 | ≤ 0.04 | reached |" in page
    assert "residual 2.0e-09 at the start, 7 products, 3 s, 2 of them for the start" in page


def test_the_page_of_many_classes_compares_with_plain_passes():
    options = {"hessian_structure": "kron", "fisher": "mc", "kfac_approx": "reduce"}
    row = {"network": "n", "options": options, "n_data": 4, "n_parameters": 5, "plain_seconds": 2.0, "peak": 2**30}
    row |= {"fit_seconds": 12.0, "curvature_seconds": 4.0, "decomposition_seconds": 1.0}
    row |= {"passes": 2.76, "passes_without_check": 1.67}
    exact = {**row, "options": {"hessian_structure": "kron"}}
    page = fisher_page.to_markdown(dict(zip(fisher_page.CASES, (row, exact), strict=False)))
    assert "| reduce | 4 | 2.00 | 1.0 | 2.0 | ≤ 2.5 | reached | 6.0 | ≤ 2.5 | **missed** | 2.8 | 1.7 | 1.00 |" in page
    assert "| exact | expand | 4 | 2.00 | 1.0 | 2.0 | – | – | 6.0 | – | – | 2.8 | 1.7 | 1.00 |" in page


def test_the_page_of_regvar_has_what_was_measured():
    step = {"plain": 1.0, "regularized": 1.05, "forward": 1.0, "inference": 2.5}
    page = regvar_page.to_markdown({"step-0": step})
    assert "| 1.050 | ≤ 1.1 | reached |" in page
    assert "| 2.50 | ≤ 2.1 | **missed** |" in page
