"""The tables of the results page, from records that no method made."""

import pytest
from synthetic_records import write_cell

from bdl_bench.records import RecordStore
from bdl_bench.report.results import group_by_task, load_records
from benchmarks import results

METHODS = ("map", "ensemble", "laplace")


@pytest.fixture
def nll_table(tmp_path):
    """nll_table(tuned) -> the lines of the table of the negative log-likelihood, split into entries."""

    def lines(tuned):
        store = RecordStore(tmp_path)
        for method in METHODS:
            record = write_cell(store, "task", "regression", method, 0)
            if method not in tuned:
                arrays = store.arrays(record)
                kept = {name: arrays[name] for name in arrays if not name.startswith("tuned/")}
                store.write(record.model_copy(update={"tuning": None, "tuned": {}}), kept)
        text = results.tables(group_by_task(store, load_records(store)))
        table = text.split("## ")[1].splitlines()
        return [[entry.strip() for entry in line.strip("|").split("|")] for line in table if line.startswith("|")]

    return lines


@pytest.mark.parametrize("tuned", [METHODS, METHODS[:1], ()])
def test_the_table_of_the_nll_has_every_method_tuned_or_not(tuned, nll_table):
    header, _, *rows = nll_table(tuned)
    assert header == ["method", *(["task"] if tuned else []), "task, untuned"]
    assert sorted(row[0] for row in rows) == sorted(f"`{method}`" for method in METHODS)
    assert all(row[-1] != "–" for row in rows)
    if tuned:
        assert {row[0] for row in rows if row[1] != "–"} == {f"`{method}`" for method in tuned}
        assert [row[1] == "–" for row in rows] == sorted(row[1] == "–" for row in rows)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (-0.0001, ".000"),
        (0.0, ".000"),
        (0.9996, "1.000"),
        (-0.9996, "−1.000"),
        (-0.052, "−.052"),
        (10.05, "10.050"),
        (None, "–"),
        (float("nan"), "nan"),
    ],
)
def test_numbers_have_no_leading_zero_and_zero_no_sign(value, text):
    assert results._number(value) == text
