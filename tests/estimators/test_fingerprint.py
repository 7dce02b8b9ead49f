"""Fingerprints of a model: cheap, and different after any change."""

import pytest
import torch

from estimators.model_checks import fingerprint


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
)
@pytest.mark.parametrize("size", [0, 1, 3, 1024, 5001])
def test_a_fingerprint_sees_every_single_change(dtype, size):
    module = torch.nn.Module()
    module.register_buffer("values", torch.arange(size).to(dtype))
    before = fingerprint(module)
    assert fingerprint(module) == before
    for place in {0, size // 2, size - 1} if size else ():
        kept = module.values[place].clone()
        module.values[place] = not kept if dtype == torch.bool else -kept - 1
        assert fingerprint(module) != before
        module.values[place] = kept
    assert fingerprint(module) == before


def test_a_fingerprint_sees_an_exchange_of_two_weights():
    model = torch.nn.Linear(100, 50)
    before = fingerprint(model)
    with torch.no_grad():
        model.weight[[3, 4]] = model.weight[[4, 3]]
    assert fingerprint(model) != before


def test_a_fingerprint_reads_a_slice_of_a_larger_tensor():
    whole = torch.arange(11.0)
    module = torch.nn.Module()
    module.register_buffer("values", whole[3:8])
    before = fingerprint(module)
    whole[0] = -1.0
    assert fingerprint(module) == before
    whole[7] = -1.0
    assert fingerprint(module) != before
