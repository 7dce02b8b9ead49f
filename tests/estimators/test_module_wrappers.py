"""Models inside torch.compile, DataParallel and averaged models have the names of the module inside."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from estimators.errors import ModelError
from estimators.runtime.module_wrappers import named_tensors, parameter_aliases, unwrap_children_, unwrapped

WRAPPERS = {
    "compiled": torch.compile,
    "data parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "both": lambda model: nn.DataParallel(torch.compile(model)),
}
wrappers = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


def network():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Linear(3, 2)).eval()
    model[2].weight = model[0].weight
    return model


@wrappers
def test_a_wrapped_model_has_the_module_and_the_names_inside(wrap):
    model = network()
    wrapped = wrap(model)
    assert type(unwrapped(wrapped)) is nn.Sequential
    assert unwrapped(model) is model
    assert list(named_tensors(wrapped)) == list(model.state_dict())
    assert parameter_aliases(wrapped) == parameter_aliases(model)
    assert parameter_aliases(model)["0.weight"] == ["0.weight", "2.weight"]


@wrappers
def test_a_wrapped_layer_has_the_names_inside_and_a_copy_can_do_without_the_wrapper(wrap):
    model = network()
    names = list(model.state_dict())
    model[3] = wrap(model[3])
    assert list(named_tensors(model)) == names
    plain = unwrap_children_(copy.deepcopy(model))
    assert list(plain.state_dict()) == names
    assert type(model[3]) is not nn.Linear
    assert type(plain[3]) is nn.Linear


def test_a_module_that_only_calls_a_part_of_it_module_is_no_wrapper():
    class Scaled(nn.DataParallel):
        def forward(self, x):
            return 2 * self.module(x)

    model = nn.Module()
    model.module = nn.Linear(2, 2)
    assert unwrapped(model) is model
    scaled = Scaled(nn.Linear(2, 2))
    assert unwrapped(scaled) is scaled
    assert list(named_tensors(scaled)) == ["module.weight", "module.bias"]


def test_hooks_of_a_wrapper_are_not_dropped_in_silence():
    wrapped = nn.DataParallel(network())
    wrapped.register_forward_hook(lambda *_: None)
    with pytest.raises(ModelError, match=r"hooks on the DataParallel.*module inside"):
        unwrapped(wrapped)
