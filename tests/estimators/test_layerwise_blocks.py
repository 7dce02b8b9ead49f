"""Structures of the GGN layer by layer: kron, ekfac and diag against dense formulas, on every kind of layer."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from estimators import Gaussian, LastLayerLaplace, LinearizedLaplace
from estimators.errors import DiagonalWeightsWarning, IndefiniteHessianError, OptionError
from estimators.models import Network
from estimators.models.layer_jacobians import LayerwiseJacobian


class Attention(nn.Module):
    """A block with nn.MultiheadAttention, LayerNorm, positions, and one weight that is used twice."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.positions = nn.Parameter(torch.randn(3, 4))
        self.norm, self.twice, self.head = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = x + self.positions
        h = self.norm(h + self.attention(h, h, h)[0])
        return self.head(self.twice(torch.tanh(self.twice(h))).mean(1))


class Residual(nn.Module):
    """Convolutions with stride and dilation, BatchNorm, a skip; a grouped convolution, which is left to the rest."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.BatchNorm2d(4)
        self.body, self.grouped = nn.Conv2d(4, 4, 3, padding=2, dilation=2, bias=False), nn.Conv2d(4, 4, 1, groups=2)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        h = F.relu(self.norm(self.stem(x)))
        return self.head((h + self.grouped(torch.tanh(self.body(h)))).mean((2, 3)))


class TiedLanguageModel(nn.Module):
    """Tokens in, an embedding tied to the output, and a layer of the transposed kind (addmm)."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.weight, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

    def forward(self, tokens):
        h = self.embedding(tokens)
        h = torch.addmm(self.bias, h.reshape(-1, 4), self.weight).view_as(h)
        return self.head(torch.tanh(h).mean(1))[:, :2]


def mlp(bias=True):
    return nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Tanh(), nn.Linear(4, 2, bias=bias))


NETWORKS = {
    "mlp": (mlp, (3,), ["0.weight", "2.weight"], []),
    "attention": (
        Attention,
        (3, 4),
        ["attention.in_proj_weight", "attention.out_proj.weight", "twice.weight", "head.weight"],
        ["positions", "norm.weight", "norm.bias"],
    ),
    "residual": (
        Residual,
        (2, 6, 6),
        ["stem.weight", "body.weight", "head.weight"],
        ["norm.weight", "norm.bias", "grouped.weight", "grouped.bias"],
    ),
    "tied": (TiedLanguageModel, None, ["weight"], ["embedding.weight"]),
}
LIKELIHOODS = {"classification": "classification", "regression": Gaussian(0.6)}


def problem(name="mlp", n=7, **options):
    make, shape, *_ = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = make(**options).double().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
        x = torch.randint(0, 5, (n, 3)) if shape is None else torch.randn(n, *shape, dtype=torch.float64)
        targets = {"classification": torch.randint(0, 2, (n,)), "regression": torch.randn(n, 2, dtype=torch.float64)}
    return model, x, targets


def fitted(structure, name="mlp", kind="classification", n=7, model_options=None, **options):
    model, x, targets = problem(name, n, **(model_options or {}))
    y = targets[kind]
    options = {"prior_precision": 1.7, **options}
    estimator = LinearizedLaplace(model, LIKELIHOODS[kind], hessian_structure=structure, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DiagonalWeightsWarning)  # grouped and tied weights, on purpose
        return estimator.fit([(x[:3], y[:3]), (x[3:], y[3:])]), x


def dense(name="mlp", kind="classification", n=7, **options):
    return fitted("full", name, kind, n, inverse="cholesky", **options)[0].data_curvature_.matrix


@pytest.mark.parametrize("name", NETWORKS)
def test_the_factors_and_the_rest_are_the_jacobian(name):
    model, x, _ = problem(name)
    network = Network(model, [n for n, _ in model.named_parameters()])
    layers = LayerwiseJacobian(network, x)
    assert [list(layers.maps), layers.other_params] == list(NETWORKS[name][2:])
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    jacobian = jacrev(lambda p: functional_call(model, p, (x,)))(parameters)  # derived without the library
    rows = list(layers.rows_at(x))
    rest = torch.cat([part.other_rows for part in rows])
    assert torch.allclose(rest, torch.cat([rest[..., :0], *(jacobian[n].flatten(2) for n in layers.other_params)], -1))
    for weight, linear in layers.maps.items():
        factors = [part.factors[weight] for part in rows]
        whole = torch.cat([torch.einsum("mkto,mte->mkoe", f.gradients, f.inputs) for f in factors])
        expected = jacobian[weight].flatten(3) if not linear.transposed else jacobian[weight].transpose(2, 3)
        assert torch.allclose(whole[..., : linear.n_inputs], expected)
        if linear.bias is not None:
            assert torch.allclose(whole[..., -1], jacobian[linear.bias])


@pytest.mark.parametrize("kind", LIKELIHOODS)
@pytest.mark.parametrize("name", NETWORKS)
def test_diag_is_the_diagonal_of_the_exact_ggn(name, kind):
    delta = {"*weight": 1.3, "*": 2.9}
    estimator, x = fitted("diag", name, kind, prior_precision=delta)
    diagonal = dense(name, kind).diagonal() + estimator.objective_.prior.precision
    jacobian = estimator.network_.jacobian(x)
    assert torch.allclose(estimator.covariance(x), jacobian / diagonal @ jacobian.transpose(1, 2), rtol=1e-9)
    assert torch.allclose(estimator.variance(x), (jacobian.square() / diagonal).sum(-1), rtol=1e-9)
    assert torch.allclose(estimator.precision_.log_det(), diagonal.log().sum())


def kronecker_block(model, likelihood, x):
    """K-FAC of the first layer of the bias-free MLP, by loops: mean of a aᵀ ⊗ sum of b bᵀ."""
    inner, outer = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    for row in x:
        hidden = model[0](row).detach().requires_grad_()
        slope = torch.autograd.functional.jacobian(lambda h: model[2](torch.tanh(h)), hidden)  # (C, 4)
        inner += torch.outer(row, row) / len(x)
        outer += slope.T @ likelihood.hessian(model(row[None]).detach())[0] @ slope
    return torch.kron(outer, inner)


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_kron_is_the_kronecker_product_of_the_mean_outer_products_plus_delta(kind):
    bias_free = {"bias": False}
    estimator, x = fitted("kron", kind=kind, model_options=bias_free, subset_of_weights="0.*")
    block = kronecker_block(estimator.model, estimator.likelihood, x)
    precision = block + 1.7 * torch.eye(12, dtype=torch.float64)
    jacobian = estimator.network_.jacobian(x)
    exact = jacobian @ torch.linalg.solve(precision, jacobian.flatten(0, 1).T).T.reshape(7, 2, 12).transpose(1, 2)
    assert torch.allclose(estimator.covariance(x), exact)
    assert torch.allclose(estimator.variance(x), exact.diagonal(dim1=1, dim2=2))
    assert torch.allclose(estimator.precision_.log_det(), torch.logdet(precision))


@pytest.mark.parametrize("structure", ["kron", "ekfac"])
def test_one_row_without_sharing_is_exact_block_by_block(structure):
    estimator, _ = fitted(structure, n=4)  # batches of three rows and one
    model, x, targets = problem(n=4)
    one = LinearizedLaplace(model, "classification", prior_precision=1.7, hessian_structure=structure)
    one.fit([(x[:1], targets["classification"][:1])])
    ggn = LinearizedLaplace(model, "classification", prior_precision=1.7, inverse="cholesky")
    ggn.fit([(x[:1], targets["classification"][:1])])
    blocks = torch.block_diag(ggn.data_curvature_.matrix[:16, :16], ggn.data_curvature_.matrix[16:, 16:])
    jacobian = one.network_.jacobian(x)
    precision = blocks + 1.7 * torch.eye(26, dtype=torch.float64)
    exact = jacobian @ torch.linalg.inv(precision) @ jacobian.transpose(1, 2)
    assert torch.allclose(one.covariance(x), exact, rtol=1e-6)
    assert not torch.allclose(one.covariance(x), estimator.covariance(x), rtol=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_ekfac_has_the_exact_second_moments_in_its_basis(name):
    estimator, _ = fitted("ekfac", name)
    ggn, precision = dense(name), estimator.precision_
    p = len(ggn)
    for weight, block in precision.blocks.items():
        o, e = block.eigenvalues.shape
        basis = torch.zeros(o * e, p, dtype=torch.float64)
        vectors = torch.einsum("io,je->oeij", block.output_basis, block.input_basis).reshape(o * e, o, e)
        precision.layout.put(basis, weight, vectors)
        moments = ((basis @ ggn) * basis).sum(1).reshape(o, e) + 1.7
        assert torch.allclose(block.eigenvalues, moments)


@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag"])
@pytest.mark.parametrize("name", NETWORKS)
def test_variance_covariance_solve_and_determinant_speak_of_one_matrix(structure, name):
    estimator, x = fitted(structure, name)
    inverse = estimator.precision_.solve(torch.eye(estimator.theta_.numel(), dtype=torch.float64))
    assert torch.allclose(inverse, inverse.T, atol=1e-12)
    jacobian = estimator.network_.jacobian(x)
    covariance = jacobian @ inverse @ jacobian.transpose(1, 2)
    assert torch.allclose(estimator.covariance(x), covariance)
    assert torch.allclose(estimator.precision_.covariance(jacobian), covariance)
    assert torch.allclose(estimator.variance(x), covariance.diagonal(dim1=1, dim2=2))
    assert torch.allclose(estimator.precision_.log_det(), -torch.logdet(inverse))
    assert torch.allclose(torch.cat([estimator.variance(part) for part in x.split(2)]), estimator.variance(x))


@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag"])
def test_float32_vectors_are_solved_in_float64_and_come_back_in_float32(structure):
    estimator, _ = fitted(structure, "attention")
    vectors = torch.randn(3, estimator.theta_.numel(), dtype=torch.float64)
    solved = estimator.precision_.solve(vectors.float())
    assert solved.dtype == torch.float32
    assert torch.allclose(solved.double(), estimator.precision_.solve(vectors.float().double()), rtol=1e-6)


@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_samples_have_the_covariance(structure):
    estimator, x = fitted(structure, "attention")
    deviations = estimator.sample(x[:2], 20000) - estimator.model(x[:2]).detach()
    covariance = torch.einsum("kmc,kmd->mcd", deviations, deviations) / 20000
    exact = estimator.covariance(x[:2])
    assert float((covariance - exact).norm() / exact.norm()) < 0.05


def test_kron_of_the_last_layer_is_the_closed_form_on_features():
    model, x, targets = problem()
    loader = [(x[:3], targets["classification"][:3]), (x[3:], targets["classification"][3:])]
    options = {"prior_precision": 1.7, "hessian_structure": "kron"}
    layer = LinearizedLaplace(model, "classification", subset_of_weights="last_layer", **options).fit(loader)
    closed = LastLayerLaplace(model, "classification", **options).fit(loader)
    assert torch.allclose(layer.covariance(x), closed.covariance(x))
    assert torch.allclose(layer.log_marginal_likelihood(), closed.log_marginal_likelihood())


@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag"])
def test_another_delta_costs_no_pass(structure):
    estimator, _ = fitted(structure)
    again, _ = fitted(structure, prior_precision=4.1)
    assert torch.allclose(estimator.log_marginal_likelihood(4.1), again.log_marginal_likelihood())
    assert not math.isclose(float(estimator.log_marginal_likelihood()), float(again.log_marginal_likelihood()))


def test_fewer_rows_at_a_time_change_nothing(monkeypatch):
    estimator, x = fitted("kron", "residual")
    monkeypatch.setattr("estimators.models.layer_jacobians.rows_per_chunk", lambda _: 2)
    monkeypatch.setattr("estimators.curvature.layerwise.kronecker_block.rows_per_chunk", lambda _, **__: 1)
    again, _ = fitted("kron", "residual")
    assert torch.allclose(estimator.variance(x), again.variance(x))


def test_the_backend_and_the_inverse_are_named():
    estimator, _ = fitted("ekfac")
    assert (estimator.jacobian_backend_, estimator.inverse_) == ("layers", "eigen")


def test_two_deltas_in_one_layer_are_rejected_where_the_basis_mixes_them():
    with pytest.raises(OptionError, match=r"0.weight and 0.bias.*diag"):
        fitted("kron", prior_precision={"*bias": 0.5, "*": 1.0})


def test_a_structure_that_a_missing_prior_leaves_singular_is_rejected():
    model, x, targets = problem()
    unseen = x * torch.tensor([0.0, 1.0, 1.0])  # the first input is always off
    estimator = LinearizedLaplace(
        model, "classification", prior_precision={"0.*": 0.0, "*": 1.0}, hessian_structure="diag"
    )
    with pytest.raises(IndefiniteHessianError):
        estimator.fit([(unseen, targets["classification"])])


@pytest.mark.parametrize(
    "options",
    [
        {"hessian_structure": "kron", "curvature": "hessian"},
        {"hessian_structure": "kron", "inverse": "cholesky"},
        {"hessian_structure": "band"},
    ],
)
def test_combinations_that_do_not_exist_list_those_that_do(options):
    with pytest.raises(OptionError, match="ggn, ekfac, eigen"):
        LinearizedLaplace(mlp(), "regression", **options)


@pytest.mark.parametrize("structure", ["kron", "ekfac"])
@pytest.mark.parametrize("places", [1, 2])
def test_inputs_that_no_row_has_shown_keep_the_prior_whether_the_matrix_or_the_rows_are_kept(
    structure, places, monkeypatch
):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(9, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * places, 2)).double().eval()
        x, y = torch.randn(4, places, 9, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
        queries = torch.randn(5, places, 9, dtype=torch.float64)

    def fit():
        estimator = LinearizedLaplace(model, "classification", prior_precision=1.7, hessian_structure=structure)
        return estimator.fit([(x[: 4 // places], y[: 4 // places])])

    few = fit()
    block = few.precision_.blocks["0.weight"]
    assert block.input_basis.shape == (10, 4)
    monkeypatch.setattr("estimators.curvature.layerwise.second_moment.SecondMoment.add", _always_as_a_matrix)
    whole = fit()
    assert whole.precision_.blocks["0.weight"].input_basis.shape == (10, 10)
    assert torch.allclose(few.variance(queries), whole.variance(queries))
    assert torch.allclose(few.covariance(queries), whole.covariance(queries))
    assert torch.allclose(few.precision_.log_det(), whole.precision_.log_det())
    eye = torch.eye(few.theta_.numel(), dtype=torch.float64)
    assert torch.allclose(few.precision_.solve(eye), whole.precision_.solve(eye), atol=1e-12)
    deviations = few.sample(queries[:1], 20000) - model(queries[:1]).detach()
    covariance = torch.einsum("kmc,kmd->mcd", deviations, deviations) / 20000
    exact = few.covariance(queries[:1])
    assert float((covariance - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize("structure", ["kron", "ekfac"])
def test_outputs_that_no_row_has_shown_keep_the_prior_whether_the_matrix_or_the_rows_are_kept(structure, monkeypatch):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 12)).double().eval()
        x, y = torch.randn(4, 4, dtype=torch.float64), torch.tensor([0, 11, 1, 5])

    def fit():
        options = {"prior_precision": 1.7, "hessian_structure": structure, "fisher": "empirical"}
        return LinearizedLaplace(model, "classification", **options).fit([(x[:3], y[:3]), (x[3:], y[3:])])

    whole = fit()
    assert whole.precision_.blocks["2.weight"].output_basis.shape == (12, 12)
    monkeypatch.setattr("estimators.curvature.layerwise.blocks._MOST_DENSE_OUTPUTS", 11)
    few = fit()
    assert few.precision_.blocks["2.weight"].output_basis.shape == (12, 4)
    assert torch.allclose(few.variance(x), whole.variance(x))
    assert torch.allclose(few.precision_.log_det(), whole.precision_.log_det())
    inverse = few.precision_.solve(torch.eye(few.theta_.numel(), dtype=torch.float64))
    assert torch.allclose(few.posterior_variance(), inverse.diagonal())
    assert torch.allclose(few.posterior_variance(), whole.posterior_variance())
    delta = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    found, expected = (one.log_marginal_likelihood(prior_precision=delta) for one in (few, whole))
    assert torch.allclose(found, expected)
    slopes = [torch.autograd.grad(one, delta)[0] for one in (found, expected)]
    assert torch.allclose(*slopes)


def _always_as_a_matrix(self, rows):
    self.n_rows += len(rows)
    self.matrix = rows.T @ rows + (0 if self.matrix is None else self.matrix)
