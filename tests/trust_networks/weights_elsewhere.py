"""Weights that forward reaches by another way than the attributes of registered modules."""

import functools
import types
import weakref
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from trust_networks.case import network, vectors


def _mlp(outputs=2):
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs))


class _Body(nn.Module):
    """Two linear layers and an adapter that forward itself does not use."""

    def __init__(self):
        super().__init__()
        self.body, self.adapter = _mlp(), nn.Linear(4, 5)

    def forward(self, x):
        return self.body(x)


@network(vectors())
class ForwardHookAdapter(_Body):
    def __init__(self):
        super().__init__()
        self.body[0].register_forward_hook(lambda module, inputs, output: output + self.adapter(inputs[0]))


@network(vectors())
class ForwardHookWithKeywords(_Body):
    def __init__(self):
        super().__init__()

        def hook(module, args, kwargs, output):
            return output * torch.sigmoid(self.adapter(args[0]))

        self.body[0].register_forward_hook(hook, with_kwargs=True)


@network(vectors())
class ForwardPreHook(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.lift = _mlp(), nn.Linear(4, 4)
        self.body.register_forward_pre_hook(lambda module, inputs: (torch.tanh(self.lift(inputs[0])),))

    def forward(self, x):
        return self.body(x)


@network(vectors())
class HookOfABoundMethod(_Body):
    def __init__(self):
        super().__init__()
        self.body[1].register_forward_hook(self.add)

    def add(self, module, inputs, output):
        return output + self.adapter(self.seen)

    def forward(self, x):
        self.seen = x
        return self.body(x)


@network(vectors())
class FeaturesInADict(nn.Module):
    """A hook stores features in a plain dict, and forward reads them from there."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head, self.features = _mlp(3), nn.Linear(5, 2), {}
        self.backbone[1].register_forward_hook(lambda module, inputs, output: self.features.update(hidden=output))

    def forward(self, x):
        self.backbone(x)
        return self.head(self.features["hidden"])


@network(vectors())
def features_in_an_outer_dict():
    """The dict belongs to the script that made the model."""
    features = {}

    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = _mlp(3), nn.Linear(5, 2)
            self.backbone[0].register_forward_hook(lambda module, inputs, output: features.update(h=output))

        def forward(self, x):
            return self.backbone(x)[:, :2] + self.head(torch.tanh(features["h"]))

    model = Probe()
    model.outer = features
    return model


@network(vectors())
class TiedByLambda(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(4, 8), nn.Linear(4, 2)
        self.decode = lambda h: h @ self.encoder.weight

    def forward(self, x):
        return self.head(torch.tanh(self.decode(torch.tanh(self.encoder(x)))))


@network(vectors())
class PartialOfAWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)
        self.first = functools.partial(F.linear, weight=self.a.weight, bias=self.a.bias)

    def forward(self, x):
        return self.b(torch.tanh(self.first(x)))


@network(vectors())
class PartialOfAMethod(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)
        first, last = (functools.partial(self.apply_layer, layer) for layer in (self.a, self.b))
        self.steps = [first, torch.tanh, last]

    @staticmethod
    def apply_layer(layer, x):
        return layer(x)

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


@network(vectors())
class ModulesInAPlainList(nn.Module):
    """Registered once in a ModuleList, used from a plain list."""

    def __init__(self):
        super().__init__()
        self.order = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)]
        self.registered = nn.ModuleList(self.order)

    def forward(self, x):
        for layer in self.order:
            x = layer(x)
        return x


@network(vectors())
class ParametersInAPlainList(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = [nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(2, 5))]
        for i, weight in enumerate(self.weights):
            self.register_parameter(f"weight{i}", weight)

    def forward(self, x):
        return torch.tanh(x @ self.weights[0].T) @ self.weights[1].T


@network(vectors())
class ParametersInAPlainDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 5), nn.Linear(5, 2)
        self.table = {"w": self.layer.weight, "b": self.layer.bias}

    def forward(self, x):
        return self.head(torch.tanh(F.linear(x, self.table["w"], self.table["b"])))


@dataclass
class _Weights:
    w: torch.Tensor
    b: torch.Tensor


@network(vectors())
class ParametersInADataclass(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b, self.head = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(5)), nn.Linear(5, 2)
        self.weights = _Weights(self.w, self.b)

    def forward(self, x):
        return self.head(torch.tanh(x @ self.weights.w.T + self.weights.b))


@network(vectors())
class ModuleBehindAWeakReference(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)
        self.first = weakref.ref(self.a)

    def forward(self, x):
        return self.b(torch.tanh(self.first()(x)))


@network(vectors())
class ParentInAList(nn.Module):
    """A child that reaches its siblings through the parent."""

    class Child(nn.Module):
        def forward(self, x):
            return torch.tanh(self.parent[0].a(x))

    def __init__(self):
        super().__init__()
        self.a, self.b, self.child = nn.Linear(4, 5), nn.Linear(5, 2), ParentInAList.Child()
        self.child.parent = [self]

    def forward(self, x):
        return self.b(self.child(x))


@network(vectors())
def a_global_parameter():
    """forward uses a parameter through a name of an enclosing scope."""
    scale = nn.Parameter(torch.randn(5))

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.scale = nn.Linear(4, 5), nn.Linear(5, 2), scale

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)) * scale)

    return Scaled()


@network(vectors())
class PatchedForward(nn.Module):
    """`forward` replaced on the instance by a function that calls the old one."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)
        old = self.forward
        self.forward = lambda x: old(x)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


@network(vectors())
def patched_forward_of_a_layer():
    """Low-rank adaptation by hand: the forward of one layer is replaced on the instance."""
    model = _mlp()
    layer = model[0]
    layer.down, layer.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 5, bias=False)
    old = layer.forward
    layer.forward = lambda x: old(x) + layer.up(layer.down(x))
    return model


@network(vectors())
def method_bound_to_a_layer():
    model = _mlp()

    def forward(self, x):
        return F.linear(torch.sin(x), self.weight, self.bias)

    model[0].forward = types.MethodType(forward, model[0])
    return model


@network(vectors())
class LayerHiddenFromRegistration(nn.Module):
    """An alias set past nn.Module.__setattr__."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)
        object.__setattr__(self, "alias", self.a)

    def forward(self, x):
        return self.b(torch.tanh(self.alias(x)))


@network(vectors())
class PropertyOfAWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.raw, self.b = nn.Parameter(torch.randn(5, 4)), nn.Linear(5, 2)

    @property
    def weight(self):
        return F.softplus(self.raw)

    def forward(self, x):
        return self.b(torch.tanh(x @ self.weight.T))
