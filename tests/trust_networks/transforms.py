"""torch.func and torch.autograd inside forward: force fields, score networks, ensembles."""

import torch
from torch import nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

from trust_networks.case import network, vectors


def _energy(width=8):
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))


@network(vectors(), outputs=4)
class ForceField(nn.Module):
    """Minus the gradient of an energy."""

    def __init__(self):
        super().__init__()
        self.energy = _energy()

    def forward(self, x):
        return -grad(lambda z: self.energy(z).sum())(x)


@network(vectors(), outputs=4)
class ForceFieldWide(ForceField):
    """P = 601: forms layer by layer are chosen by default."""

    def __init__(self):
        super().__init__()
        self.energy = _energy(100)


@network(vectors(), outputs=5)
class EnergyAndForce(nn.Module):
    """Every weight is used once in plain sight and once inside of grad."""

    def __init__(self):
        super().__init__()
        self.energy = _energy(90)

    def forward(self, x):
        return torch.cat([self.energy(x), -grad(lambda z: self.energy(z).sum())(x)], 1)


@network(vectors(), outputs=4)
class ForceByAutograd(nn.Module):
    def __init__(self):
        super().__init__()
        self.energy = _energy()

    def forward(self, x):
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            return -torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


@network(vectors())
class VmapInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x):
        return vmap(lambda row: self.b(torch.tanh(self.a(row))))(x)


@network(vectors())
class VmapAndPlain(nn.Module):
    """P above 500; the middle weight is used under vmap and outside of it."""

    def __init__(self):
        super().__init__()
        self.a, self.mix, self.b = nn.Linear(4, 20), nn.Linear(20, 20), nn.Linear(20, 2)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.b(torch.tanh(self.mix(h)) + vmap(lambda row: self.mix(row.sin()))(h))


@network(vectors())
class DirectionalDerivative(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x):
        return jvp(lambda z: self.b(torch.tanh(self.a(z))), (x,), (torch.ones_like(x),))[1]


@network(vectors(), outputs=4)
class JacobianInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.energy = _energy()

    def forward(self, x):
        return vmap(jacrev(lambda row: self.energy(row)[0]))(x)


@network(vectors(), outputs=4)
class ForwardJacobianInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.energy = _energy()

    def forward(self, x):
        return vmap(jacfwd(lambda row: self.energy(row)[0]))(x)


@network(vectors(), outputs=1)
class Laplacian(nn.Module):
    """The trace of a Hessian: two derivatives inside."""

    def __init__(self):
        super().__init__()
        self.energy = _energy()

    def forward(self, x):
        hessian = vmap(jacfwd(jacrev(lambda row: self.energy(row)[0])))(x)
        return hessian.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)


@network(vectors())
class FunctionalCallInside(nn.Module):
    """A base network that is called with shifted weights."""

    def __init__(self):
        super().__init__()
        self.base = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
        self.shift = nn.Parameter(torch.randn(5))

    def forward(self, x):
        weights = dict(self.base.named_parameters())
        weights["0.bias"] = weights["0.bias"] + self.shift
        return functional_call(self.base, weights, (x,))


@network(vectors())
class EnsembleInside(nn.Module):
    """Members stacked and run by vmap."""

    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(3, 5, 4)), nn.Parameter(torch.randn(3, 5))
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        members = vmap(lambda w, b: torch.tanh(x @ w.T + b))(self.w, self.b)
        return self.head(members.mean(0))


@network(vectors())
class ChunkedVmap(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.b(vmap(lambda row: torch.tanh(self.a(row)), chunk_size=4)(x))
