"""Each regularizer against its own dense formula, from a Jacobian and an A that share no code with the library."""

import pytest
import torch
from torch import nn

from bdl_bench.verify.reference import DenseReference
from estimators import (
    Gaussian,
    LinearResponse,
    MeanAbsolute,
    NewtonRefit,
    ParameterProbes,
    Pointwise,
    PosteriorDraws,
    RegVar,
    SignedProbes,
)

SIGMA = 0.6
OUTPUTS = {"regression": 2, "classification": 3, "binary": 2}
DELTA = {"ggn": 2.3, "hessian": 60.0}  # the second makes the Hessian at random weights positive definite


def problem(kind, curvature):
    generator = torch.Generator().manual_seed(7)
    c = OUTPUTS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, c)).double().eval()
    x = torch.randn(19, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 2, (19, c), generator=generator).double()
    if kind == "classification":
        y = torch.randint(0, c, (19,), generator=generator)
    batches = list(zip(x.split(8), y.split(8), strict=True))
    names = [name for name, _ in model.named_parameters()]
    reference = DenseReference(model, batches, names, kind, sigma=SIGMA, delta=DELTA[curvature])
    query = 1.4 * torch.randn(4, 3, generator=generator, dtype=torch.float64)
    return model, (Gaussian(SIGMA) if kind == "regression" else kind), batches, query, reference


SOLVERS = [LinearResponse(), NewtonRefit(1e-5, "central")]
KINDS = pytest.mark.parametrize("kind", OUTPUTS)
EITHER = pytest.mark.parametrize("solver", SOLVERS, ids=repr)


def choices():
    """Every likelihood and curvature by linear response, and each of them by a refit; the rest is nightly."""
    for i, kind in enumerate(OUTPUTS):
        for j, curvature in enumerate(["ggn", "hessian"]):
            for solver in SOLVERS:
                nightly = solver is SOLVERS[1] and j != i % 2
                marks = pytest.mark.verification if nightly else ()
                yield pytest.param(kind, curvature, solver, marks=marks, id=f"{kind}-{curvature}-{solver!r}")


EACH = pytest.mark.parametrize(("kind", "curvature", "solver"), list(choices()))


def fitted(kind, curvature, regularizer, solver):
    model, likelihood, batches, query, reference = problem(kind, curvature)
    parts = {"prior_precision": DELTA[curvature], "curvature": curvature}
    regvar = RegVar(model, likelihood, regularizer=regularizer, solver=solver, **parts).fit(batches)
    return regvar, query, reference, reference.jacobian(query), torch.linalg.inv(reference.precision(curvature))


def assert_close(found, formula):
    assert float((found - formula).abs().max() / formula.abs().max()) < 1e-6


@EACH
def test_pointwise_gives_the_columns_of_the_covariance(kind, curvature, solver):
    regvar, x, _, jacobian, inverse = fitted(kind, curvature, Pointwise(), solver)
    covariance = torch.einsum("mcp,pq,mdq->mcd", jacobian, inverse, jacobian)
    assert_close(regvar.covariance(x), covariance)
    assert_close(regvar.variance(x), covariance.diagonal(dim1=1, dim2=2))


@EACH
def test_pointwise_of_a_functional_gives_its_variance_by_the_chain_rule(kind, curvature, solver):
    def functional(f):
        return torch.stack([f[0] - f[1], f.square().sum()])

    regvar, x, reference, jacobian, inverse = fitted(kind, curvature, Pointwise(of=functional), solver)
    f = reference.outputs(x)
    slope = torch.zeros(4, 2, f.shape[1], dtype=f.dtype)
    slope[:, 0, 0], slope[:, 0, 1], slope[:, 1] = 1, -1, 2 * f
    rows = slope @ jacobian
    assert_close(regvar.variance(x), torch.einsum("mdp,pq,mdq->md", rows, inverse, rows))


@EACH
def test_mean_absolute_gives_the_size_of_a_sign_weighted_mean_covariance(kind, curvature, solver):
    regvar, x, reference, jacobian, inverse = fitted(kind, curvature, MeanAbsolute(), solver)
    train = torch.cat([rows for rows, _ in reference.batches])
    signs = reference.outputs(train).sign()
    cross = torch.einsum("mcp,pq,ndq->mcnd", jacobian, inverse, reference.jacobian(train))  # Σ(x, xₙ)
    assert_close(regvar.variance(x), (cross * signs).mean((2, 3)).abs())


@EACH
def test_signed_probes_give_the_probed_diagonal_of_the_joint_covariance(kind, curvature, solver):
    regularizer = SignedProbes(n_probes=5, seed=3)
    regvar, x, reference, jacobian, inverse = fitted(kind, curvature, regularizer, solver)
    signs = regularizer.signs(regvar.objective_, reference.outputs(x))
    assert sorted(signs.unique().tolist()) == [-1, 1]
    joint = torch.einsum("mcp,pq,ndq->mcnd", jacobian, inverse, jacobian)
    assert_close(regvar.variance(x), (signs * torch.einsum("mcnd,knd->kmc", joint, signs)).mean(0))


@EACH
def test_parameter_probes_give_the_mean_product_of_two_responses(kind, curvature, solver):
    regvar, x, _, jacobian, inverse = fitted(kind, curvature, ParameterProbes(n_probes=5, seed=3), solver)
    u = torch.randn(5, len(inverse), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    responses = torch.einsum("mcp,pq,kq->kmc", jacobian, inverse, u)
    assert_close(regvar.variance(x), (responses * torch.einsum("mcp,kp->kmc", jacobian, u)).mean(0))


@KINDS
@EITHER
@pytest.mark.parametrize("block", [None, "last_layer"])
def test_posterior_draws_give_the_mean_squared_response_to_the_noise(kind, solver, block):
    regularizer = PosteriorDraws(n_draws=5, seed=3, rao_blackwell=block)
    regvar, x, _, jacobian, inverse = fitted(kind, "ggn", regularizer, solver)
    plain = PosteriorDraws(n_draws=5, seed=3, rao_blackwell=None)
    xi = plain.build_problem(regvar.refit_objective_)[
        0
    ].gradient  # the noise: its covariance is tested by its statistics
    formula = torch.zeros(())
    if block is not None:
        inside = torch.zeros(len(inverse), dtype=torch.bool)
        inside[20:] = True  # after Linear(3, 5)
        a = torch.linalg.inv(inverse)
        xi = torch.where(inside, 0.0, xi - xi[:, inside] @ torch.linalg.solve(a[inside][:, inside], a[inside]))
        head = jacobian[..., inside]
        formula = torch.einsum("mcp,pq,mcq->mc", head, torch.linalg.inv(a[inside][:, inside]), head)
    responses = torch.einsum("mcp,pq,kq->kmc", jacobian, inverse, xi)
    assert_close(regvar.variance(x), formula + responses.square().mean(0))
