"""Gradients that are not the slope of the function: what autograd says is what training used, and what holds."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trust_networks.case import network, vectors


class _Two(nn.Module):
    def __init__(self, hidden=5):
        super().__init__()
        self.a, self.head = nn.Linear(4, hidden), nn.Linear(hidden, 2)


@network(vectors())
class NoGradBackbone(_Two):
    def forward(self, x):
        with torch.no_grad():
            h = torch.tanh(self.a(x))
        return self.head(h)


@network(vectors())
class NoGradDecorator(_Two):
    @torch.no_grad()
    def features(self, x):
        return torch.tanh(self.a(x))

    def forward(self, x):
        return self.head(self.features(x))


@network(vectors())
class NoGradBackboneAndMore(nn.Module):
    """Two trained layers behind a backbone that no gradient reaches."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 8))
        self.head = nn.Sequential(nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x):
        with torch.set_grad_enabled(False):
            h = self.backbone(x)
        return self.head(h)


@network(vectors())
class DetachedBackbone(_Two):
    def forward(self, x):
        return self.head(torch.tanh(self.a(x)).detach())


@network(vectors())
class DetachedHalf(_Two):
    """One branch is detached, and the weight is used in the other, too."""

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.head(h * h.sigmoid().detach())


@network(vectors())
class DataOfAWeight(_Two):
    def forward(self, x):
        return self.head(torch.tanh(self.a(x) + x @ self.a.weight.data.T))


@network(vectors())
class DataOfActivations(_Two):
    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.head(h + h.data.square())


@network(vectors())
class StraightThroughByDetach(_Two):
    """Rounded forward, the identity backward."""

    def forward(self, x):
        h = self.a(x)
        return self.head(h + (h.round() - h).detach())


class _OldRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return h.round()

    @staticmethod
    def backward(ctx, g):
        return 1.5 * g


@network(vectors())
class StraightThroughOldStyle(_Two):
    def forward(self, x):
        return self.head(_OldRound.apply(self.a(x)))


class _OldSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h)
        return h.square()

    @staticmethod
    def backward(ctx, g):
        (h,) = ctx.saved_tensors
        return 2 * h * g


@network(vectors())
class FunctionOldStyle(_Two):
    def forward(self, x):
        return self.head(_OldSquare.apply(torch.tanh(self.a(x))))


class _NewRound(torch.autograd.Function):
    @staticmethod
    def forward(h):
        return h.round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return 0.5 * g


@network(vectors())
class StraightThroughWithSetupContext(_Two):
    def forward(self, x):
        return self.head(_NewRound.apply(self.a(x)))


class _VmapRound(_NewRound):
    generate_vmap_rule = True


@network(vectors())
class StraightThroughWithVmapRule(_Two):
    def forward(self, x):
        return self.head(_VmapRound.apply(self.a(x)))


class Reverse(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(h):
        return h.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return -g

    @staticmethod
    def jvp(ctx, t):
        return t.clone()  # forward mode says otherwise, on purpose


@network(vectors())
class GradientReversal(_Two):
    """The head of a domain-adversarial network."""

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.head(Reverse.apply(h)) + h[:, :2]


@network(vectors())
class GradientReversalByHook(_Two):
    def forward(self, x):
        h = torch.tanh(self.a(x))
        if h.requires_grad:
            h.register_hook(lambda g: -0.5 * g)
        return self.head(h) + h[:, 1:3]


@network(vectors())
class TensorHookScales(_Two):
    def forward(self, x):
        h = self.a(x)
        if h.requires_grad:
            h.register_hook(lambda g: 2.0 * g)
        return self.head(torch.tanh(h))


@network(vectors())
def parameter_hook_scales():
    """A hook on the parameter itself: autograd.grad applies it."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    model[0].weight.register_hook(lambda g: 3.0 * g)
    return model


@network(vectors())
def full_backward_hook_observes():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    model[1].register_full_backward_hook(lambda module, inputs, outputs: None)
    return model


@network(vectors())
def full_backward_hook_scales():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    model[1].register_full_backward_hook(lambda module, inputs, outputs: (0.5 * inputs[0],))
    return model


@network(vectors())
def full_backward_pre_hook():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    model[1].register_full_backward_pre_hook(lambda module, outputs: (2.0 * outputs[0],))
    return model


@network(vectors())
class Checkpointed(_Two):
    def forward(self, x):
        return self.head(checkpoint(lambda z: torch.tanh(self.a(z)), x, use_reentrant=False))


@network(vectors(), expects="answer or raise")
class CheckpointedByReentrance(_Two):
    """The reentrant kind: with inputs that need no gradient it gives its block none, and it does not allow
    autograd.grad, so that the reference has to be made by hand."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(checkpoint(lambda z: torch.tanh(self.a(z)), self.first(x), use_reentrant=True))


@network(vectors())
class OnceDifferentiable(_Two):
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h):
            ctx.save_for_backward(h)
            return h**3

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            (h,) = ctx.saved_tensors
            return 3 * h.square() * g

    def forward(self, x):
        return self.head(OnceDifferentiable.Cube.apply(torch.tanh(self.a(x))))


@network(vectors())
class BinaryWeights(_Two):
    """Signs forward, a clipped identity backward: a binarised layer."""

    def forward(self, x):
        w = self.a.weight
        binary = w + (w.sign() - w.clamp(-1, 1)).detach() - (w - w.clamp(-1, 1)).detach()
        return self.head(torch.tanh(x @ binary.T + self.a.bias))
