"""Small problems, dense formulas written a second time, and a watch over everything that `fit` must leave alone."""

import random
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacfwd, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from weight_space_fits import fit

from estimators import Bernoulli, Categorical, Gaussian

LIKELIHOODS = {
    "regression": Gaussian(sigma_noise=0.6),
    "classification": Categorical(),
    "binary": Bernoulli(),
}


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same random state, and leaves none behind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@dataclass
class Problem:
    """A network, a likelihood, rows in batches that do not divide them, and queries."""

    model: nn.Module
    kind: str
    x: torch.Tensor
    y: torch.Tensor
    query: torch.Tensor
    delta: float = 2.5
    batch_size: int = 6
    likelihood: object = field(init=False)

    def __post_init__(self):
        self.likelihood = LIKELIHOODS[self.kind]

    @property
    def loader(self):
        return list(zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True))


def targets(kind, f):
    generator = torch.Generator().manual_seed(7)
    if kind == "regression":
        return f + torch.randn(f.shape, generator=generator, dtype=f.dtype)
    if kind == "classification":
        return torch.randint(0, f.shape[1], (len(f),), generator=generator)
    return torch.randint(0, 2, f.shape, generator=generator).to(f.dtype)


@pytest.fixture
def make_problem():
    """(kind, model=None, shape=(4,), n=20) -> Problem in float64, C = 3 (regression and binary: 2) by default."""

    def make(kind="classification", model=None, shape=(4,), n=20, **options):
        outputs = 3 if kind == "classification" else 2
        model = model or nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs))
        model = model.double().eval()
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
        query = torch.randn(7, *shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            y = targets(kind, model(x))
        return Problem(model, kind, x, y, query, **options)

    return make


@pytest.fixture(scope="session")
def _posterior_fits():
    return {}


@pytest.fixture
def posterior_fit(_posterior_fits, make_problem):
    """(name, kind) -> (fit over weights, problem) of `weight_space_fits`; each is made once, and tests only read it."""

    def get(name, kind="classification"):
        if (name, kind) not in _posterior_fits:
            problem = make_problem(kind)
            _posterior_fits[name, kind] = fit(name, problem), problem
        return _posterior_fits[name, kind]

    return get


def _slow_path(method):
    """The plain kernels: fused attention and fused encoder layers have no forward mode."""

    @wraps(method)
    def wrapped(*arguments):
        enabled = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                return method(*arguments)
        finally:
            torch.backends.mha.set_fastpath_enabled(enabled)

    return wrapped


class ByHand:
    """Dense Laplace from −log p written out, by automatic differentiation of the user's own module."""

    def __init__(self, problem, names=None):
        self.problem = problem
        everything = dict(problem.model.named_parameters())
        names = [n for n, p in everything.items() if p.requires_grad] if names is None else names
        self.shapes = {name: everything[name].shape for name in names}
        self.theta = torch.cat([everything[name].detach().reshape(-1) for name in names])

    def f(self, theta, x):
        params = theta.split([shape.numel() for shape in self.shapes.values()])
        state = {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), params, strict=True)}
        return functional_call(self.problem.model, state, (x,))

    def minus_log_p(self, f, y):
        """The sum over rows, constants left out."""
        if self.problem.kind == "regression":
            return ((f - y) ** 2).sum() / (2 * 0.6**2)
        if self.problem.kind == "classification":
            return (torch.logsumexp(f, -1) - f.gather(-1, y[:, None])[:, 0]).sum()
        return (torch.log1p(torch.exp(f)) - y * f).sum()

    @_slow_path
    def jacobian(self, x):
        return jacrev(self.f)(self.theta, x).detach()

    @_slow_path
    def data_ggn(self):
        """The Hessian in θ of the loss of the linearised network."""
        problem = self.problem
        with torch.no_grad():
            f = self.f(self.theta, problem.x)
        jacobian = self.jacobian(problem.x)
        at = torch.zeros_like(self.theta)
        return jacfwd(grad(lambda d: self.minus_log_p(f + jacobian @ d, problem.y)))(at).detach()

    @_slow_path
    def data_hessian(self):
        """By forward over reverse."""
        problem = self.problem
        return jacfwd(grad(lambda theta: self.minus_log_p(self.f(theta, problem.x), problem.y)))(self.theta).detach()

    def precision(self, curvature="ggn", delta=None):
        data = self.data_ggn() if curvature == "ggn" else self.data_hessian()
        delta = torch.as_tensor(self.problem.delta if delta is None else delta, dtype=data.dtype)
        return data + delta.expand(len(data)).diag()

    def covariance(self, x, curvature="ggn", delta=None):
        jacobian = self.jacobian(x)
        solved = torch.linalg.solve(self.precision(curvature, delta), jacobian.transpose(1, 2))
        return jacobian @ solved

    def variance(self, x, curvature="ggn", delta=None):
        return self.covariance(x, curvature, delta).diagonal(dim1=1, dim2=2)


@pytest.fixture
def by_hand():
    return ByHand


def _hooks(model):
    return [
        len(getattr(module, name))
        for module in model.modules()
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    ]


def _state(model):
    """All that `fit` must leave alone."""
    if not isinstance(model, nn.Module):
        return {}
    return {
        "weights": {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()},
        "buffers": {name: (id(b), b.clone()) for name, b in model.named_buffers()},
        "mode": [module.training for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [p.grad for p in model.parameters()],
        "hooks": _hooks(model),
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "parameter attributes": [sorted(vars(p)) for p in model.parameters()],
    }


def _random_state():
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def _same_tensors(before, after):
    assert before.keys() == after.keys()
    for name, (identity, value) in before.items():
        assert identity == after[name][0]
        assert value.dtype == after[name][1].dtype
        assert value.is_meta or torch.equal(value.nan_to_num(123.0), after[name][1].nan_to_num(123.0)), name


@pytest.fixture
def untouched():
    """`with untouched(model): ...` asserts that model, hooks, random state and grad mode are as before."""

    @contextmanager
    def watch(model):
        before, (torch_state, python_state, numpy_state) = _state(model), _random_state()
        modes = (torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled())
        yield
        after, (torch_now, python_now, numpy_now) = _state(model), _random_state()
        for key in before:
            if key in ("weights", "buffers"):
                _same_tensors(before[key], after[key])
            else:
                assert before[key] == after[key], key
        assert torch.equal(torch_state, torch_now)
        assert python_state == python_now
        assert numpy_state[0] == numpy_now[0]
        assert np.array_equal(numpy_state[1], numpy_now[1])
        assert numpy_state[2:] == numpy_now[2:]
        assert modes == (torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled())

    return watch
