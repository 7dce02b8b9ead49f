"""How much memory there is, and chunks that fit into a budget."""

import pytest
import torch

from estimators.errors import TooLargeError
from estimators.runtime import memory

CPU = torch.device("cpu")


def test_there_is_some_memory():
    assert 2**20 < memory.available_bytes(CPU) < 2**62


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [("max", "5", 2**63), ("1000", "400", 600), ("1000", "1500", 0)],
)
def test_the_limit_of_a_container_counts(limit, used, expected, tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text(used + "\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory._container_bytes() == expected
    assert memory.available_bytes(CPU) <= expected


def test_without_a_container_there_is_no_such_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "nothing")
    assert memory._container_bytes() == 2**63


def test_what_fits_is_let_through_and_what_does_not_is_rejected_with_both_sizes(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda _: 3 * 2**30)
    memory.check_fits_memory("a matrix", 3 * 2**30, device=CPU, remedy="a smaller one.")
    with pytest.raises(TooLargeError, match=r"a matrix.*3\.00 GiB.*need of 4\.50 GiB.*a smaller one") as caught:
        memory.check_fits_memory("a matrix", int(4.5 * 2**30), device=CPU, remedy="a smaller one.")
    assert (caught.value.bytes_needed, caught.value.bytes_available) == (int(4.5 * 2**30), 3 * 2**30)


@pytest.mark.parametrize(("row", "budget", "rows"), [(10, 100, 10), (33, 100, 3), (1000, 100, 1), (0, 100, 100)])
def test_a_chunk_is_what_fits_and_at_least_a_row(row, budget, rows):
    assert memory.rows_per_chunk(row, budget=budget) == rows
