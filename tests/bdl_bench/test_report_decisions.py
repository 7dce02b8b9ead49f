"""The sections on decisions, from records that no method made."""

import numpy as np
import pytest

from bdl_bench.metrics import evaluate
from bdl_bench.records.record import RecordStore
from bdl_bench.report.sections.decisions import Decisions
from bdl_bench.report.view import build


@pytest.fixture
def write_search(write_record, tmp_path):
    """write_search(method, seed, regret, greedy) -> a record of Bayesian optimisation with constant regrets."""

    def write(method, seed, regret, greedy):
        record = write_record("search", method, seed, scale=0.1 * len(method))
        curves = {"regret": regret, "random_regret": 4.0 + 0.1 * seed, "greedy_regret": greedy}
        arrays = {f"decision/{name}": np.full(4, value) for name, value in curves.items()}
        found = RecordStore(tmp_path).arrays(record) | arrays | {"decision/labels": np.arange(10.0, 14.0)}
        RecordStore(tmp_path).write(record.model_copy(update={"metrics": evaluate("regression", found)}), found)

    return write


def decisions_of(directory):
    return next(s for s in build(directory).tasks[0].sections if isinstance(s, Decisions))


@pytest.mark.parametrize(
    ("seeds", "sentence"),
    [
        (2, "Greedy queries are not tested, since the seeds are too few."),
        (4, "No method is significantly different from greedy queries, which use no variance."),
    ],
)
def test_greedy_queries_are_only_called_equal_if_they_were_tested(write_search, tmp_path, seeds, sentence):
    for seed in range(seeds):
        for method in ("laplace", "ensemble"):
            write_search(method, seed, regret=1.0, greedy=1.0 + (-1) ** seed)
    assert decisions_of(tmp_path).sentences[-1] == sentence
