"""Networks that torch.compile, torch.jit or a wrapper stands in front of."""

import warnings

import torch
from torch import nn
from torch.nn import functional as F

from trust_networks.case import network, vectors


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


@network(vectors())
def compiled_forward():
    model = _Net()
    model.forward = torch.compile(model.forward, backend="eager")
    return model


@network(vectors())
def compiled_model():
    return torch.compile(_Net(), backend="eager")


@network(vectors())
def compiled_in_place():
    model = _Net()
    model.compile(backend="eager")
    return model


@network(vectors())
def compiled_layer():
    model = _Net()
    model.a = torch.compile(model.a, backend="eager")
    return model


def _quiet(function, *args):
    """torch.jit says that it is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args)


def _affine(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x @ w.t() + b)


@network(vectors())
class ScriptedFunction(nn.Module):
    """A weight used in a scripted function and once more outside of it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)
        self.affine = _quiet(torch.jit.script, _affine)

    def forward(self, x):
        return self.b(self.affine(x, self.a.weight, self.a.bias) + self.a(x))


@network(vectors(), name="scripted-function-wide")
class ScriptedFunctionWide(nn.Module):
    """P above 500, where forms layer by layer are chosen by default."""

    def __init__(self):
        super().__init__()
        self.a, self.mix, self.b = nn.Linear(4, 20), nn.Linear(20, 20), nn.Linear(20, 2)
        self.affine = _quiet(torch.jit.script, _affine)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.b(self.mix(h) + self.affine(h, self.mix.weight, self.mix.bias))


@network(vectors(), expects="answer or raise")
class TracedSubmodule(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = _quiet(torch.jit.trace, nn.Sequential(nn.Linear(4, 5), nn.Tanh()), torch.randn(3, 4))
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.body(x))


@network(vectors(), expects="answer or raise")
class ScriptedSubmodule(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = _quiet(torch.jit.script, nn.Sequential(nn.Linear(4, 5), nn.Tanh()))
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.body(x))


@network(vectors(), expects="answer or raise")
def scripted_model():
    return _quiet(torch.jit.script, _Net())


@network(vectors())
def data_parallel():
    return nn.DataParallel(_Net())


@network(vectors())
class CalledByItsClass(nn.Module):
    """`type(layer).forward(layer, x)`, and __call__ overridden."""

    class Layer(nn.Linear):
        def __call__(self, x):
            return torch.tanh(super().__call__(x))

    def __init__(self):
        super().__init__()
        self.a, self.b = CalledByItsClass.Layer(4, 5), nn.Linear(5, 2)

    def forward(self, x):
        return nn.Linear.forward(self.b, self.a(x))


@network(vectors())
class ForwardPassedOn(nn.Module):
    """A wrapper that hands every attribute on to the module inside."""

    def __init__(self):
        super().__init__()
        self.inner = _Net()

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, x):
        return F.softsign(self.b(torch.tanh(self.a(x))))
