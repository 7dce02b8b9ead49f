"""Models as `accelerate` and the Hugging Face Trainer leave them: in autocast, or with their weights elsewhere."""

import copy
from types import MethodType

import pytest
import torch
from torch import nn

from estimators import LastLayerLaplace, LinearizedLaplace, LinearResponse, Pointwise, RegVar
from estimators.errors import ModelError

accelerate = pytest.importorskip("accelerate")
from accelerate.hooks import remove_hook_from_module  # noqa: E402
from accelerate.utils import convert_outputs_to_fp32  # noqa: E402

DELTA = 1.3


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).eval()


def rows():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(20, 4, generator=generator), torch.randn(20, 2, generator=generator)
    return list(zip(x.split(7), y.split(7), strict=True))


QUERIES = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))


def in_autocast(model):
    """As `Accelerator(mixed_precision="bf16").prepare` does, and Trainer(bf16=True) leaves behind."""
    model._original_forward = model.forward
    model.forward = MethodType(torch.autocast("cpu", dtype=torch.bfloat16)(model.forward.__func__), model)
    model.forward = MethodType(convert_outputs_to_fp32(model.forward.__func__), model)
    return model


ROUTES = {
    "laplace": lambda model: LinearizedLaplace(model, "regression", prior_precision=DELTA),
    "cg": lambda model: LinearizedLaplace(model, "regression", prior_precision=DELTA, inverse="cg"),
    "last layer": lambda model: LastLayerLaplace(model, "regression", prior_precision=DELTA),
    "pointwise": lambda model: RegVar(
        model, "regression", prior_precision=DELTA, regularizer=Pointwise(), solver=LinearResponse()
    ),
}


@pytest.mark.parametrize("route", ROUTES)
def test_a_model_left_in_autocast_has_the_variance_of_its_weights(route):
    plain = network()
    model = in_autocast(copy.deepcopy(plain))
    wrapped = model.forward
    assert (model(QUERIES) - plain(QUERIES)).abs().max() > 1e-4  # autocast rounds
    found = ROUTES[route](model).fit(rows()).variance(QUERIES)
    torch.testing.assert_close(found, ROUTES[route](plain).fit(rows()).variance(QUERIES), rtol=1e-5, atol=0)
    assert model.forward is wrapped


def test_offloaded_weights_are_an_error_with_a_remedy_that_works():
    plain = network()
    model = accelerate.cpu_offload(copy.deepcopy(plain))
    with pytest.raises(ModelError, match=r"'0.weight' on the meta device.*remove_hook_from_module"):
        ROUTES["laplace"](model).fit(rows())
    remove_hook_from_module(model, recurse=True)
    found = ROUTES["laplace"](model).fit(rows()).variance(QUERIES)
    torch.testing.assert_close(found, ROUTES["laplace"](plain).fit(rows()).variance(QUERIES))
