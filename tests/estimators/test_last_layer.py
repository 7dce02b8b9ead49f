"""Last-layer Laplace in closed form: an independent second route to the same numbers."""

import math

import pytest
import torch
from torch import nn

from estimators import Gaussian, LastLayerLaplace, LinearizedLaplace
from estimators.errors import IndefiniteHessianError, ModelError, OptionError, TooLargeError, UnsupportedError

kinds = pytest.mark.parametrize("kind", ["regression", "classification", "binary"])
structures = pytest.mark.parametrize("structure", ["full", "kron", "diag"])
SIGMA = 0.6


def fit(problem, **options):
    options = {"prior_precision": problem.delta, **options}
    return LastLayerLaplace(problem.model, problem.likelihood, **options).fit(problem.loader)


def exact(problem, **options):
    options = {"prior_precision": problem.delta, "subset_of_weights": "last_layer", **options}
    return LinearizedLaplace(problem.model, problem.likelihood, inverse="cholesky", **options).fit(problem.loader)


def outputs(kind):
    return 3 if kind == "classification" else 2


def bodies():
    return {
        "mlp": (lambda c: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, c)), (4,)),
        "no bias": (lambda c: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, c, bias=False)), (4,)),
        "linear": (lambda c: nn.Linear(4, c), (4,)),
        "frozen bias": (with_frozen_bias, (4,)),
        "cnn": (lambda c: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, c)), (1, 4, 4)),
        "norms": (
            lambda c: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, c)),
            (4,),
        ),
        "nothing after but identity": (
            lambda c: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, c), nn.Identity(), nn.Dropout(0.2)),
            (4,),
        ),
    }


def with_frozen_bias(c):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, c))
    model[2].bias.requires_grad_(requires_grad=False)
    return model


@pytest.mark.parametrize("body", bodies())
@kinds
def test_the_full_form_is_the_linearized_laplace_of_the_last_layer(body, kind, make_problem, by_hand):
    build, shape = bodies()[body]
    problem = make_problem(kind, model=build(outputs(kind)), shape=shape)
    fitted, other = fit(problem), exact(problem)
    covariance = fitted.covariance(problem.query)
    assert torch.allclose(covariance, other.covariance(problem.query), rtol=1e-8, atol=1e-12)
    assert torch.allclose(fitted.variance(problem.query), other.variance(problem.query), rtol=1e-8)
    assert torch.allclose(fitted.log_marginal_likelihood(), other.log_marginal_likelihood(), rtol=1e-10)
    names = list(fitted.network_.subset.shapes)
    assert torch.allclose(covariance, by_hand(problem, names).covariance(problem.query), rtol=1e-8, atol=1e-12)


def features(problem):
    """φ with a 1, and Λ by hand, for the MLP of make_problem."""

    def at(x):
        with torch.no_grad():
            hidden = torch.tanh(problem.model[0](x))
        return torch.cat([hidden, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)

    with torch.no_grad():
        f = problem.model(problem.x)
    if problem.kind == "regression":
        lam = torch.eye(2, dtype=f.dtype).expand(20, 2, 2) / SIGMA**2
    elif problem.kind == "classification":
        p = f.softmax(1)
        lam = p.diag_embed() - p[:, :, None] * p[:, None, :]
    else:
        lam = (f.sigmoid() * (1 - f.sigmoid())).diag_embed()
    return at, lam


def dense_precision(problem, structure, delta):
    """A over the rows of (C, E) written out with Kronecker products."""
    at, lam = features(problem)
    phi = at(problem.x)
    full = sum(torch.kron(lam[n], torch.outer(phi[n], phi[n])) for n in range(len(phi)))
    data = {"full": full, "diag": full.diag().diag(), "kron": torch.kron(lam.mean(0), phi.T @ phi)}[structure]
    return data + delta * torch.eye(len(data), dtype=data.dtype)


def dense_covariance(problem, structure, delta):
    at, lam = features(problem)
    c = lam.shape[1]
    inverse = torch.linalg.inv(dense_precision(problem, structure, delta))
    rows = [torch.kron(torch.eye(c, dtype=lam.dtype), phi[None]) for phi in at(problem.query)]  # (C, C·E)
    return torch.stack([row @ inverse @ row.T for row in rows])


@structures
@kinds
def test_each_structure_is_its_own_dense_formula(structure, kind, make_problem):
    problem = make_problem(kind)
    fitted = fit(problem, hessian_structure=structure)
    expected = dense_covariance(problem, structure, problem.delta)
    assert torch.allclose(fitted.covariance(problem.query), expected, rtol=1e-8, atol=1e-13)
    assert torch.allclose(fitted.variance(problem.query), expected.diagonal(dim1=1, dim2=2), rtol=1e-8)


@structures
@kinds
def test_the_marginal_likelihood_of_each_structure_also_for_another_prior(structure, kind, make_problem):
    problem = make_problem(kind)
    fitted = fit(problem, hessian_structure=structure)
    with torch.no_grad():
        log_likelihood = -problem.likelihood.nll(problem.model(problem.x), problem.y).sum()
        theta = torch.cat([problem.model[2].weight.flatten(), problem.model[2].bias])
    for delta in (problem.delta, 0.4, 9.0):
        scale = torch.tensor(1 / math.sqrt(delta), dtype=torch.float64)
        prior = torch.distributions.Normal(0.0, scale).log_prob(theta).sum()
        log_det = torch.logdet(dense_precision(problem, structure, delta))
        expected = log_likelihood + prior + 0.5 * (len(theta) * math.log(2 * math.pi) - log_det)
        assert torch.allclose(fitted.log_marginal_likelihood(delta), expected, rtol=1e-10)
    assert torch.equal(fitted.log_marginal_likelihood(), fitted.log_marginal_likelihood(problem.delta))


@structures
@kinds
def test_samples_have_the_covariance_of_their_structure_jointly_over_queries(structure, kind, make_problem):
    problem = make_problem(kind)
    fitted = fit(problem, hessian_structure=structure)
    samples = fitted.sample(problem.query, 20_000)
    assert samples.shape == (20_000, 7, outputs(kind))
    at, lam = features(problem)
    c = lam.shape[1]
    rows = torch.cat([torch.kron(torch.eye(c, dtype=lam.dtype), phi[None]) for phi in at(problem.query)])
    joint = rows @ torch.linalg.inv(dense_precision(problem, structure, problem.delta)) @ rows.T
    found = samples.reshape(20_000, -1).T.cov()
    assert torch.allclose(found, joint, atol=6 * float(joint.abs().max()) / math.sqrt(20_000))
    with torch.no_grad():
        mean = problem.model(problem.query)
    assert torch.allclose(samples.mean(0), mean, atol=6 * float(joint.diag().max().sqrt()) / math.sqrt(20_000))


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_a_mapping_gives_weight_and_bias_their_own_precision(structure, make_problem):
    problem = make_problem()
    fitted = fit(problem, hessian_structure=structure, prior_precision={"*.bias": 0.5, "*": 4.0})
    change = torch.cat([torch.full((5,), 4.0), torch.tensor([0.5])]).repeat(3).double().diag()
    at, lam = features(problem)
    inverse = torch.linalg.inv(dense_precision(problem, structure, 0.0) + change)
    rows = [torch.kron(torch.eye(3, dtype=lam.dtype), phi[None]) for phi in at(problem.query)]
    expected = torch.stack([row @ inverse @ row.T for row in rows])
    assert torch.allclose(fitted.covariance(problem.query), expected, rtol=1e-8, atol=1e-13)


def test_the_kronecker_form_has_one_precision_for_the_whole_layer(make_problem):
    with pytest.raises(OptionError, match=r'one prior_precision.*values from 0\.5 to 4.*"full" or "diag"'):
        fit(make_problem(), hessian_structure="kron", prior_precision={"*.bias": 0.5, "*": 4.0})


def test_biases_without_a_prior_are_allowed_where_the_data_determine_them(make_problem):
    problem = make_problem("regression")
    free = {"*.bias": 0.0, "*": 2.0}
    found, other = fit(problem, prior_precision=free), exact(problem, prior_precision=free)
    assert torch.allclose(found.covariance(problem.query), other.covariance(problem.query), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("structure", ["full", "kron"])
def test_a_softmax_layer_without_any_prior_is_singular_and_rejected(structure, make_problem):
    with pytest.raises(IndefiniteHessianError, match="a singular one"):
        fit(make_problem(), hessian_structure=structure, prior_precision={"*": 0.0})


def test_a_dead_feature_without_a_prior_is_rejected_by_the_diagonal_form(make_problem):
    problem = make_problem(model=nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
    with torch.no_grad():
        problem.model[0].bias[1] = -1e3
    with pytest.raises(IndefiniteHessianError, match="a singular one"):
        fit(problem, hessian_structure="diag", prior_precision={"*": 0.0})


@structures
def test_variance_does_not_depend_on_how_queries_and_rows_are_batched(structure, make_problem, monkeypatch):
    problem = make_problem()
    fitted = fit(problem, hessian_structure=structure)
    whole = fitted.covariance(problem.query)
    params = torch.cat([fitted.covariance(part) for part in problem.query.split(2)])
    assert torch.allclose(params, whole, rtol=1e-10)
    monkeypatch.setattr("estimators.curvature.last_layer.precision.rows_per_chunk", lambda _, **__: 3)
    assert torch.allclose(fit(problem, hessian_structure=structure).covariance(problem.query), whole, rtol=1e-10)
    problem.batch_size = 20
    assert torch.allclose(fit(problem, hessian_structure=structure).covariance(problem.query), whole, rtol=1e-10)


@structures
def test_last_layer_uncertainty_is_part_of_that_of_all_layers(structure, make_problem):
    problem = make_problem()
    whole = exact(problem, subset_of_weights="all").variance(problem.query)
    if structure == "full":
        assert bool((fit(problem).variance(problem.query) < whole).all())
    found = fit(problem, hessian_structure=structure).variance(problem.query)
    at, _ = features(problem)
    prior = at(problem.query).square().sum(1, keepdim=True) / problem.delta
    assert bool((found < prior).all())


@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_a_thousand_classes_need_no_jacobian(structure, make_problem, monkeypatch):
    """(B, C, C·(D+1)) would be 20 × 1000 × 65000 numbers, 10 GB; the network's own Jacobian is never asked for."""
    monkeypatch.setattr("estimators.models.network.Network.jacobian", None)
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1000))
    problem = make_problem(model=model)
    problem.y = torch.arange(20) * 50
    fitted = fit(problem, hessian_structure=structure)
    variance = fitted.variance(problem.query[:2])
    assert variance.shape == (2, 1000)
    assert torch.allclose(fitted.covariance(problem.query[:2]).diagonal(dim1=1, dim2=2), variance, rtol=1e-8)


def test_a_layer_too_large_for_the_full_form_is_rejected_with_the_size(make_problem, monkeypatch):
    problem = make_problem()
    monkeypatch.setattr("estimators.runtime.memory.available_bytes", lambda _: 1000)
    monkeypatch.setattr("estimators.curvature.last_layer.features.LastLayer.full_curvature", None)
    with pytest.raises(TooLargeError, match=r'18 parameters.*hessian_structure="kron" or "diag"') as caught:
        fit(problem)
    assert caught.value.bytes_needed >= 18**2 * 8


@pytest.mark.parametrize("bad", ["lowrank", None, "FULL"])
def test_an_unknown_structure_is_rejected(bad, make_problem):
    problem = make_problem()
    with pytest.raises(OptionError, match=rf"'diag' or 'full' or 'kron'.*{bad}"):
        LastLayerLaplace(problem.model, problem.likelihood, hessian_structure=bad)


def test_features_with_a_time_axis_are_left_to_the_other_route(make_problem):
    class PerStep(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(x).squeeze(1)

    problem = make_problem(model=PerStep(), shape=(1, 4))
    with pytest.raises((ModelError, UnsupportedError), match=r"Expected .*Received .*Try: .*LinearizedLaplace"):
        fit(problem)


def test_a_frozen_body_changes_nothing(make_problem):
    problem = make_problem()
    expected = fit(problem).variance(problem.query)
    problem.model[0].requires_grad_(requires_grad=False)
    assert torch.equal(fit(problem).variance(problem.query), expected)


def test_single_precision_is_near_double_precision(make_problem):
    problem = make_problem()
    expected = {s: fit(problem, hessian_structure=s).variance(problem.query) for s in ("full", "kron", "diag")}
    problem.model.float()
    problem.x, problem.query = problem.x.float(), problem.query.float()
    for structure, variance in expected.items():
        found = fit(problem, hessian_structure=structure).variance(problem.query)
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), variance, rtol=1e-4)


def test_of_two_layers_that_give_the_outputs_the_last_is_taken_and_either_can_be_named():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3, bias=False)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(3))
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(11, 4, generator=generator).double(), torch.randn(11, 3, generator=generator).double()
    loader = list(zip(x.split(4), y.split(4), strict=True))
    options = {"likelihood": Gaussian(sigma_noise=0.6), "prior_precision": 1.9}
    for chosen, subset in ((None, "1.*"), ("0", "0.*"), ("1", "1.*")):
        found = LastLayerLaplace(model, **options, last_layer_name=chosen).fit(loader).variance(x)
        exact = LinearizedLaplace(model, **options, subset_of_weights=[subset]).fit(loader).variance(x)
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=0)
