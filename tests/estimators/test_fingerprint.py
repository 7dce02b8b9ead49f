"""Fingerprints of a model: cheap, and different after any change, of what is kept elsewhere, copied, or hashed."""

import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from estimators import LinearizedLaplace
from estimators.errors import ModelChangedError
from estimators.persistence.weight_checksum import check_unchanged, weight_checksum


def holding(values):
    module = nn.Module()
    module.register_buffer("values", values)
    return module


def of(module, *, kept):
    """Its fingerprint, with or without its tensors in a place of their own, and that place."""
    place = {name: t.clone() for name, t in module.state_dict().items()} if kept else None
    return weight_checksum(module, place), place


def is_seen(module, before):
    try:
        check_unchanged(module, *before)
    except ModelChangedError:
        return True
    return False


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
)
@pytest.mark.parametrize("size", [0, 1, 3, 1024, 5001, 70_000, 300_000])
def test_every_single_change_is_seen(dtype, size, kept):
    module = holding(torch.arange(size).to(dtype))
    before = of(module, kept=kept)
    assert not is_seen(module, before)
    for place in {0, size // 2, size - 1} if size else ():
        number = module.values[place].clone()
        module.values[place] = not number if dtype == torch.bool else 3 - number
        assert is_seen(module, before) == (number != module.values[place])
        module.values[place] = number
    assert not is_seen(module, before)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 4), (64, 64), (512, 512), (2048, 1024)])
def test_changes_of_signs_and_powers_of_two_do_not_cancel(dtype, shape, kept):
    module = holding(torch.randn(shape).to(dtype))
    before, values = of(module, kept=kept), module.values.clone()
    changes = {
        "negated": lambda v: v.neg_(),
        "a row negated": lambda v: v[1].neg_(),
        "a column negated": lambda v: v[:, 1].neg_(),
        "doubled": lambda v: v.mul_(2),
        "two signs": lambda v: v.view(-1)[1::2][:2].neg_(),
        "rows exchanged": lambda v: v.copy_(v[torch.arange(len(v)).roll(len(v) // 2)]),
        "columns exchanged": lambda v: v.copy_(v.roll(2, 1)),
    }
    for name, change in changes.items():
        module.values.copy_(values)
        change(module.values)
        assert is_seen(module, before), name


@pytest.mark.parametrize("pair", [(1.0, -1.0), (1.0, 2.0), (0.5, 0.25)])
@pytest.mark.parametrize("distance", [1, 2, 64, 2048, 8192, 131_072])
def test_an_exchange_of_two_numbers_is_seen_at_any_distance(pair, distance):
    module = holding(torch.zeros(300_000, dtype=torch.float64))
    module.values[7], module.values[7 + distance] = pair
    before = of(module, kept=False)
    assert isinstance(before[0]["values"], bytes)  # a digest
    module.values[7], module.values[7 + distance] = pair[::-1]
    assert is_seen(module, before)


@pytest.mark.parametrize("kept", [True, False])
def test_an_exchange_of_two_layers_is_seen(kept):
    model = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50))
    before, weight = of(model, kept=kept), model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.copy_(model[1].weight)
        model[1].weight.copy_(weight)
    with pytest.raises(ModelChangedError, match=r"buffers: 0.weight, 1.weight\."):
        check_unchanged(model, *before)


def test_a_slice_is_read_alone():
    whole = torch.arange(11.0)
    module = holding(whole[3:8])
    before = of(module, kept=False)
    whole[0] = -1.0
    assert not is_seen(module, before)
    whole[7] = -1.0
    assert is_seen(module, before)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(8.0)[::2],
        lambda: torch.arange(80_000.0)[::2],
        lambda: torch.ones(1).expand(5),
        lambda: torch.arange(4.0).to(torch.complex64).conj(),
        lambda: torch.arange(40_000.0).to(torch.complex64).conj(),
        lambda: torch.tensor(3.0),
        lambda: torch.arange(6.0).view(2, 3).T,
        lambda: torch.arange(60_000.0).view(200, 300).T,
        lambda: torch.tensor([1.0, torch.nan, -torch.inf]),
    ],
    ids=["strided", "long", "expanded", "conjugate", "long conjugate", "a number", "turned", "long turned", "nan"],
)
def test_buffers_of_any_layout_have_a_fingerprint(make, kept):
    module = holding(make())
    before = of(module, kept=kept)
    check_unchanged(module, *before)
    module.values = make() * 2
    with pytest.raises(ModelChangedError, match=r"buffers: values\."):
        check_unchanged(module, *before)


def test_parameters_in_another_order_are_the_same_model():
    model = nn.Linear(3, 2)
    before = of(model, kept=False)
    parametrize.register_parametrization(model, "weight", nn.Identity())
    parametrize.remove_parametrizations(model, "weight")
    assert list(model.state_dict()) == ["bias", "weight"]
    check_unchanged(model, *before)
    with torch.no_grad():
        model.bias[1] += 1
    with pytest.raises(ModelChangedError, match=r"buffers: bias\."):
        check_unchanged(model, *before)


def test_other_dtypes_and_names_are_changes():
    model = nn.Linear(3, 2)
    before = of(model, kept=True)
    model.register_buffer("more", torch.zeros(2))
    with pytest.raises(ModelChangedError, match=r"buffers: more\."):
        check_unchanged(model, *before)
    model = nn.Linear(3, 2, bias=False).double()
    with pytest.raises(ModelChangedError, match=r"buffers: bias, weight\."):
        check_unchanged(model, *before)


def test_what_a_hook_shows_is_compared_with_what_it_showed():
    model = nn.Linear(3, 2).double()
    model._register_state_dict_hook(lambda _, shown, *__: shown.update({k: v.float() for k, v in shown.items()}))
    place = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = weight_checksum(model, place)
    check_unchanged(model, before, place)
    with torch.no_grad():
        model.bias[1] += 1
    with pytest.raises(ModelChangedError, match=r"buffers: bias\."):
        check_unchanged(model, before, place)


def test_a_fit_in_a_pickle_has_its_weights_once():
    model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(20)))
    x = torch.randn(8, 20)
    fitted = LinearizedLaplace(model, "regression", hessian_structure="diag").fit([(x, model(x).detach())])
    assert len(pickle.dumps(fitted.weight_checksum_)) < 20 * len(fitted.weight_checksum_) + 1000
