"""Peak memory of a block: what it allocates is seen, and what could not be reset is marked."""

import numpy as np
import pytest

from bdl_bench.runner.peak_memory import peak_memory
from estimators.runtime import memory as module

SIZE = 2**27


def test_memory_that_was_held_for_a_moment_is_in_the_rise():
    with peak_memory("cpu") as found:
        np.ones(SIZE, dtype=np.uint8)
    if not found.reset:
        pytest.skip("this system cannot reset the peak")
    assert SIZE * 0.9 < found.increase_bytes < SIZE * 1.5
    assert found.peak_bytes > found.increase_bytes
    assert found.device_peak_bytes is None


def test_a_peak_before_the_block_is_not_counted():
    np.ones(SIZE, dtype=np.uint8)
    with peak_memory("cpu") as found:
        np.ones(SIZE // 16, dtype=np.uint8)
    if not found.reset:
        pytest.skip("this system cannot reset the peak")
    assert found.increase_bytes < SIZE / 2


def test_without_a_reset_the_figure_is_the_largest_so_far_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_CLEAR", tmp_path / "missing" / "clear_refs")
    with peak_memory("cpu") as found:
        pass
    assert not found.reset
    assert found.peak_bytes > 0
    assert found.increase_bytes == 0


def test_the_footprint_is_filled_also_when_the_block_raises():
    with pytest.raises(ZeroDivisionError), peak_memory("cpu") as found:
        1 / 0  # noqa: B018
    assert found.peak_bytes > 0
