"""One sum says whether all entries are numbers, also where the sum itself is none."""

import math

import pytest
import torch

from estimators.numerics.reductions import is_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("odd", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf]])
def test_any_nan_or_inf_is_found(dtype, odd):
    values = torch.ones(1000, dtype=dtype)
    assert is_finite(values)
    values[300 : 300 + len(odd)] = torch.tensor(odd, dtype=dtype)
    assert not is_finite(values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_whose_sum_overflows_are_numbers(dtype):
    large = torch.full((8,), torch.finfo(dtype).max, dtype=dtype)
    assert not torch.isfinite(large.sum())
    assert is_finite(large)


def test_what_is_empty_or_whole_is_finite():
    assert is_finite(torch.empty(0))
    assert is_finite(torch.tensor([2**62, 2**62, 2**62]))
