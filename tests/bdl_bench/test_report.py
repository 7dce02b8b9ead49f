"""The report: complete, escaped, and without a request to anywhere."""

import csv
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from scipy.stats import t as student

from bdl_bench.metrics import METRICS
from bdl_bench.report import write_report
from bdl_bench.report.findings import overtuned
from bdl_bench.report.formatting import number
from bdl_bench.report.scores import ScoreEntry, ScoreTable
from bdl_bench.stats import Interval
from estimators.errors import OptionError
from estimators.runtime.units import in_bytes, in_seconds

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>|`*$x^2$ {{ 7 * 7 }}'

SECTIONS = (
    "What was run",
    "trained once per task and seed",
    "No method was tuned",
    "Test metrics",
    "Calibration",
    "Agreement with linearized Laplace",
    "Time and memory",
    "how to reproduce",
    "reg/NLL",
    "cal/ECE",
)


class Tags(HTMLParser):
    """Every tag with its attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_report_is_four_files_in_the_directory(page):
    assert {p.name for p in page.parent.iterdir()} == {
        "records",
        "report.html",
        "report.md",
        "report.csv",
        "report.parquet",
    }


def test_without_pyarrow_the_report_is_three_files(write_record, tmp_path, monkeypatch):
    monkeypatch.setattr("bdl_bench.report.has_parquet", lambda: False)
    write_record("t", "laplace", 0)
    write_report(tmp_path)
    assert {p.name for p in tmp_path.glob("report.*")} == {"report.html", "report.md", "report.csv"}


def test_the_page_has_every_section(page):
    text = " ".join(Tags(page.read_text()).text.split())
    for words in SECTIONS:
        assert words in text


def test_the_page_asks_nobody_for_anything(page):
    tags = Tags(page.read_text()).tags
    assert not {"link", "iframe", "object", "base", "embed", "form"} & {tag for tag, _ in tags}
    assert [attrs for tag, attrs in tags if tag == "script"] == [{}]
    addresses = [attrs[name] for _, attrs in tags for name in ("src", "href") if name in attrs]
    assert addresses
    assert all(a.startswith(("data:image/svg+xml,", "#")) for a in addresses)
    assert "url(" not in re.sub(r'src="data:[^"]*"', "", page.read_text())


def test_the_page_has_one_calibration_picture_a_method_and_a_scatter_for_those_with_a_variance(page):
    images = [attrs["alt"] for tag, attrs in Tags(page.read_text()).tags if tag == "img"]
    assert all(images)
    for words, count in (("Reliability of ", 4), ("Coverage of ", 4), ("Standard deviation of ", 2 * 2)):
        assert sum(alt.startswith(words) for alt in images) == count


def test_names_are_text_wherever_they_come_from(write_record, tmp_path):
    for seed in range(2):
        write_record(HOSTILE, "laplace", seed, task_summary=HOSTILE)
        write_record(HOSTILE, HOSTILE, seed, method_summary=HOSTILE, kind="regression")
    write_record(
        HOSTILE, "broken", 0, status="failed", reason=HOSTILE, traceback=HOSTILE, environment={HOSTILE: HOSTILE}
    )
    parsed = Tags(write_report(tmp_path).read_text())
    assert sum(tag == "script" for tag, _ in parsed.tags) == 1
    assert not [tag for tag, attrs in parsed.tags if any(a.startswith("on") for a in attrs)]
    assert HOSTILE in parsed.text
    assert "{{ 7 * 7 }}" in parsed.text
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert not [line for line in lines if "<script>" in line and not line.startswith("    ")]


def test_a_name_that_looks_like_a_formula_is_inert_in_the_csv(write_record, tmp_path):
    write_record("=cmd()", "laplace", 0)
    write_report(tmp_path)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "report.csv").read_text())))
    assert {row["task"] for row in rows} == {"'=cmd()"}


def test_the_csv_holds_every_number_of_every_table(page):
    rows = list(csv.DictReader(io.StringIO((page.parent / "report.csv").read_text())))
    quantities = {(row["task"], row["method"], row["quantity"]) for row in rows}
    assert len(quantities) == len(rows)
    assert {("cls", "map", "cls/NLL"), ("reg", "regvar-finetune", "agreement/mean_ratio")} <= quantities
    ratio = next(r for r in rows if r["quantity"] == "agreement/mean_ratio" and r["method"] == "last-layer-laplace")
    assert float(ratio["mean"]) == pytest.approx(2 / 3)


def test_the_csv_has_means_with_their_intervals_and_costs_under_their_names(write_record, tmp_path):
    records = [write_record("t", "laplace", seed) for seed in range(3)]
    write_report(tmp_path)
    rows = {row["quantity"]: row for row in csv.DictReader(io.StringIO((tmp_path / "report.csv").read_text()))}
    values = [record.metrics["reg/NLL"] for record in records]
    half = student.ppf(0.975, 2) * np.std(values, ddof=1) / np.sqrt(3)
    found = [float(rows["reg/NLL"][name]) for name in ("mean", "low95", "high95")]
    assert found == pytest.approx([np.mean(values), np.mean(values) - half, np.mean(values) + half])
    assert rows["reg/NLL"]["seeds"] == "3"
    costs = {"fit_seconds": 1.5, "predict_seconds": 0.01, "peak_bytes": 2**28, "peak_increase_bytes": 2**20}
    assert {name: float(rows[f"cost/{name} (median)"]["mean"]) for name in costs} == costs


def test_skipped_and_failed_cells_are_shown_with_their_reason(write_record, tmp_path):
    write_record("t", "laplace", 0)
    write_record("t", "big", 0, status="skipped", reason="a need of 7 TiB")
    write_record("t", "bad", 0, status="failed", reason="went wrong", traceback="line 12")
    text = Tags(write_report(tmp_path).read_text()).text
    assert all(words in text for words in ("a need of 7 TiB", "went wrong", "line 12", "1 task · 1 method · 1 seed"))


def test_a_run_where_everything_failed_still_has_a_report(write_record, tmp_path):
    write_record("t", "bad", 0, status="failed", reason="went wrong", traceback="line 12")
    assert "went wrong" in write_report(tmp_path).read_text()


def test_a_record_without_its_arrays_is_shown_as_failed_and_the_rest_is_reported(write_record, tmp_path):
    write_record("t", "map", 0)
    record = write_record("t", "laplace", 0)
    (tmp_path / record.arrays).unlink()
    text = Tags(write_report(tmp_path).read_text()).text
    assert "its arrays are missing" in text
    assert "t, NLL untuned: best mean map" in text


def test_a_single_seed_without_reference_or_baseline_still_has_a_report(write_record, tmp_path):
    write_record("t", "last-layer-laplace", 0, kind="classification")
    assert "was not run on this task" in write_report(tmp_path).read_text()


def test_a_method_that_misses_a_seed_says_so(write_record, tmp_path):
    for seed in range(3):
        write_record("t", "map", seed, scale=0.0)
    write_record("t", "laplace", 1)
    assert "1 of 3 seeds" in write_report(tmp_path).read_text()


def test_records_of_several_versions_are_pointed_out(write_record, tmp_path):
    write_record("t", "map", 0, environment={"code": "a"})
    write_record("t", "laplace", 0, environment={"code": "b"})
    assert "2 different environments" in write_report(tmp_path).read_text()


def test_the_command_to_run_it_again_quotes_what_a_shell_would_read(write_record, tmp_path):
    write_record("my mod:make", "map", 1)
    assert "--model 'my mod:make' --methods map --seed-list 1" in Tags(write_report(tmp_path).read_text()).text


def test_a_directory_without_records_is_rejected(tmp_path):
    with pytest.raises(OptionError, match="compare wrote"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.000"), (0.00123, "0.0012"), (0.00054, "0.00054"),
     (1.23456, "1.235"), (-0.5, "−0.500"), (12.345, "12.35"), (123.45, "123.5"), (4321.0, "4321"),
     (1e-5, "1.0e−05"), (3e7, "3.0e+07"), (float("inf"), "inf")],
)  # fmt: skip
def test_numbers_have_few_digits(value, text):
    assert number(value) == text


def test_times_and_sizes_have_one_unit():
    assert [in_seconds(s) for s in (0.0012, 0.25, 1.26, 75, 150)] == ["1.2 ms", "250 ms", "1.26 s", "75 s", "2.5 min"]
    assert [in_bytes(b) for b in (2**20, 1000 * 2**20, 2**34)] == ["1 MiB", "0.977 GiB", "16 GiB"]


def test_it_is_said_where_tuning_made_most_methods_worse():
    metric = METRICS["classification"][0]

    def table(*means):
        entries = {
            f"m{i}": {metric.key: ScoreEntry(Interval(v, None, None, 1), None, False)} for i, v in enumerate(means)
        }
        return ScoreTable((metric,), entries, {})

    assert overtuned(table(0.1, 0.2, 0.3), None) == []
    assert overtuned(table(0.1, 0.2, 0.3), table(0.2, 0.1, 0.2)) == []
    (sentence,) = overtuned(table(0.1, 0.2, 0.3), table(0.2, float("inf"), 0.2))
    assert "worse after tuning for 2 of 3 methods (not tested)" in sentence
