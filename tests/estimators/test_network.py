"""A network as a function of θ: its products with the Jacobian, and modules that are awkward to copy."""

import threading

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn.utils import parametrizations

from estimators import LastLayerLaplace, LinearizedLaplace, LinearResponse, Pointwise, RegVar
from estimators.models import Network
from estimators.models.subsets import matching_names


def network_of(model):
    return Network(model, matching_names(model, "all"))


@pytest.fixture
def problem(make_problem):
    return make_problem()


def test_a_call_at_another_theta_is_the_module_with_other_weights(problem):
    network = network_of(problem.model)
    theta = torch.randn_like(network.theta)
    expected = functional_call(problem.model, network.subset.unflatten(theta), (problem.x,))
    assert torch.equal(network(theta, problem.x), expected)


def test_products_with_the_jacobian_are_those_of_the_dense_one(problem):
    network = network_of(problem.model)
    dense = jacrev(lambda theta: network(theta, problem.x))(network.theta)
    assert torch.allclose(network.jacobian(problem.x), dense, atol=1e-13)
    v, u = torch.randn(4, network.n_parameters).double(), torch.randn(4, *dense.shape[:2]).double()
    assert torch.allclose(network.jvp(problem.x, v), torch.einsum("bcp,kp->kbc", dense, v), atol=1e-12)
    assert torch.allclose(network.vjp(problem.x, u), torch.einsum("bcp,kbc->kp", dense, u), atol=1e-12)


def test_products_of_one_row_with_many_vectors_cost_as_many_backward_passes_as_it_has_outputs(problem):
    network = network_of(problem.model)
    row, v = problem.x[:1], torch.randn(7, network.n_parameters).double()
    dense = jacrev(lambda theta: network(theta, row))(network.theta)
    for _ in range(2):  # the first call is compared with plain autograd
        with network.pass_counter.phase("query"):
            assert torch.allclose(network.jvp(row, v), torch.einsum("bcp,kp->kbc", dense, v), atol=1e-12)
    counts = network.pass_counter.phases["query"]
    assert (counts.backward, counts.tangent) == (2 * 3, 0)


def test_products_in_small_pieces_are_the_same(problem, monkeypatch):
    network = network_of(problem.model)
    v, u = torch.randn(5, network.n_parameters).double(), torch.randn(5, 20, 3).double()
    whole = network.jvp(problem.x, v), network.vjp(problem.x, u)
    monkeypatch.setattr("estimators.models.network._VECTORISED_ELEMENTS", 2 * network.n_parameters)
    assert torch.allclose(network.jvp(problem.x, v), whole[0], rtol=1e-12)
    assert torch.allclose(network.vjp(problem.x, u), whole[1], rtol=1e-12)


class Counting(nn.Module):
    """Writes to a buffer in every call, also in eval mode."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return self.linear(x)


def test_a_forward_that_writes_to_a_buffer_leaves_that_of_the_user_alone(make_problem, untouched):
    problem = make_problem(model=Counting())
    with untouched(problem.model):
        fitted = LastLayerLaplace(problem.model, problem.likelihood).fit(problem.loader)
        fitted.variance(problem.query)


class Caching(nn.Module):
    """Leaves an activation, which has a graph, on itself."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        self.hidden = torch.tanh(self.body(x))
        return self.head(self.hidden)


def old_weight_norm():
    with pytest.warns(FutureWarning):
        first = nn.utils.weight_norm(nn.Linear(4, 5))
    return nn.Sequential(first, nn.Tanh(), nn.Linear(5, 3))


AWKWARD = {
    "cached activation": Caching,
    "weight norm, old style": old_weight_norm,
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)),
    "spectral norm, old style": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 5)), nn.Linear(5, 3)),
    "spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Linear(5, 3)),
}


@pytest.mark.filterwarnings(
    "ignore:There is a performance drop"
)  # torch has no batching rule for the fused weight norm
@pytest.mark.parametrize("name", AWKWARD)
def test_modules_that_are_awkward_to_copy_have_the_dense_covariance(name, make_problem, by_hand, untouched):
    problem = make_problem(model=AWKWARD[name]())
    problem.model(problem.x)  # with a graph
    problem.model(problem.x)
    with untouched(problem.model):
        fitted = LinearizedLaplace(problem.model, problem.likelihood, prior_precision=2.5).fit(problem.loader)
        found = fitted.covariance(problem.query)
        LastLayerLaplace(problem.model, problem.likelihood).fit(problem.loader)
    assert fitted.jacobian_backend_ == "torch.func"
    assert torch.allclose(found, by_hand(problem).covariance(problem.query), rtol=1e-8, atol=1e-12)


def test_a_hook_that_changes_outputs_is_part_of_the_network(make_problem, by_hand):
    problem = make_problem()
    problem.model[1].register_forward_hook(lambda _module, _args, output: 2 * output)
    fitted = LinearizedLaplace(problem.model, problem.likelihood, prior_precision=2.5).fit(problem.loader)
    assert fitted.jacobian_backend_ == "torch.func"
    exact = by_hand(problem).covariance(problem.query)
    assert torch.allclose(fitted.covariance(problem.query), exact, rtol=1e-8, atol=1e-12)


def test_a_model_that_deepcopy_cannot_copy_is_used_all_the_same(problem, untouched):
    expected = LinearizedLaplace(problem.model, problem.likelihood).fit(problem.loader).variance(problem.query)
    problem.model[0].lock = threading.Lock()
    with untouched(problem.model):
        found = LinearizedLaplace(problem.model, problem.likelihood).fit(problem.loader).variance(problem.query)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("k", [1, 3, 9, 15])
def test_ctrl_c_while_a_query_is_solved_leaves_everything_as_it_was(k, problem, untouched, monkeypatch):
    fitted = RegVar(problem.model, problem.likelihood, regularizer=Pointwise(), solver=LinearResponse())
    expected = fitted.fit(problem.loader).variance(problem.query)
    plain, calls = nn.Tanh.forward, []

    def forward(self, x):
        calls.append(1)
        if len(calls) == k:
            raise KeyboardInterrupt
        return plain(self, x)

    with untouched(problem.model):
        monkeypatch.setattr(nn.Tanh, "forward", forward)
        with pytest.raises(KeyboardInterrupt):
            fitted.variance(problem.query)
        monkeypatch.undo()
        assert torch.equal(fitted.variance(problem.query), expected)
