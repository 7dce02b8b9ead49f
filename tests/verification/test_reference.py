"""The reference itself, by finite differences and by hand: it shares no code with the library, nor do these tests."""

import ast
from pathlib import Path

import pytest
import torch
from cases import all_cases, layer_norm_network, relative_error
from reference import DenseReference, joint_covariance
from torch.func import functional_call

from bdl_bench.verify import reference as module

ONE_PER_PROBLEM = [
    case for case in all_cases() if (case.training, case.curvature, case.subset) == ("early", "hessian", "by_name")
]


def by_differences(function, at, step=1e-5):
    """Central differences of function (P,) -> (...), as (..., P)."""
    columns = [(function(at + step * e) - function(at - step * e)) / (2 * step) for e in torch.eye(len(at)).to(at)]
    return torch.stack(columns, -1)


def hessian_by_differences(reference):
    return by_differences(torch.func.grad(reference.energy), reference.theta)


@pytest.mark.parametrize("case", ONE_PER_PROBLEM, ids=str)
def test_the_hessian_is_the_difference_of_gradients(case):
    reference = case.reference
    assert relative_error(reference.precision("hessian"), hessian_by_differences(reference)) < 1e-7


@pytest.mark.parametrize("case", ONE_PER_PROBLEM, ids=str)
def test_the_ggn_is_the_sum_of_jacobians_around_the_curvature_of_the_likelihood(case):
    reference, problem = case.reference, case.problem
    total = reference.delta_vector().diag()
    for x, y in problem.batches:
        jacobian, f = reference.jacobian(x), reference.outputs(x)
        for row in range(len(y)):

            def slope(output, target=y[row : row + 1]):
                return torch.func.grad(lambda g: reference._nll(g[None], target))(output)

            curvature = by_differences(slope, f[row])  # Λ by differences of the slope of −log p
            total = total + jacobian[row].T @ curvature @ jacobian[row]
    assert relative_error(reference.precision("ggn"), total) < 1e-7


@pytest.mark.parametrize("case", ONE_PER_PROBLEM, ids=str)
def test_the_jacobian_is_the_difference_of_outputs(case):
    reference = case.reference
    x = case.problem.queries
    found = by_differences(lambda theta: reference._outputs(theta, x).detach(), reference.theta)
    assert relative_error(reference.jacobian(x), found) < 1e-8


def test_the_hessian_is_right_through_layer_norm():
    model = layer_norm_network()
    x, y = torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    reference = DenseReference(model, [(x, y)], [n for n, _ in model.named_parameters()], "regression", sigma=0.7)
    assert relative_error(reference.precision("hessian"), hessian_by_differences(reference)) < 1e-7


@pytest.mark.parametrize(
    ("kind", "distribution"),
    [
        ("regression", lambda f: torch.distributions.Normal(f, torch.tensor([0.4, 1.7], dtype=f.dtype))),
        ("classification", lambda f: torch.distributions.Categorical(logits=f)),
        ("binary", lambda f: torch.distributions.Bernoulli(logits=f)),
    ],
)
def test_the_likelihoods_are_those_of_torch(kind, distribution):
    f = torch.randn(6, 2, dtype=torch.float64)
    y = distribution(f).sample()
    reference = DenseReference(torch.nn.Linear(1, 1), [], [], kind, sigma=torch.tensor([0.4, 1.7]).double())
    torch.testing.assert_close(reference._nll(f, y), -distribution(f).log_prob(y).sum())


def test_prior_precisions_by_name_and_the_prior_mean_enter_the_energy():
    model = torch.nn.Linear(2, 1).double()
    names = ["weight", "bias"]
    reference = DenseReference(model, [], names, "regression", delta={"b*": 3.0, "*": 0.5}, prior_mean=0.2)
    assert reference.delta_vector().tolist() == [0.5, 0.5, 3.0]
    with torch.no_grad():
        expected = 0.25 * ((model.weight - 0.2) ** 2).sum() + 1.5 * ((model.bias - 0.2) ** 2).sum()
    # no rows: the energy is the prior's alone
    torch.testing.assert_close(reference._prior(reference.theta), expected)


def test_the_joint_covariance_has_the_covariance_on_its_diagonal():
    case = ONE_PER_PROBLEM[0]
    x = case.problem.queries
    joint = joint_covariance(case.reference, x, x, "ggn")
    blocks = torch.stack([joint[i, :, i, :] for i in range(len(x))])
    torch.testing.assert_close(blocks, case.reference.covariance(x, "ggn"))


def test_the_network_is_called_with_its_own_state_and_left_alone():
    case = ONE_PER_PROBLEM[0]
    x = case.problem.queries
    before = {name: p.clone() for name, p in case.problem.model.named_parameters()}
    torch.testing.assert_close(case.reference.outputs(x), functional_call(case.problem.model, before, (x,)).detach())
    case.reference.precision("hessian")
    for name, p in case.problem.model.named_parameters():
        assert torch.equal(p, before[name])


def test_the_reference_imports_nothing_from_the_library():
    tree = ast.parse(Path(module.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert not any(name.startswith(("estimators", "bdl_bench")) for name in imported if name)
