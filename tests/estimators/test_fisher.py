"""Sampled and empirical Fisher information, and K-FAC "reduce", against dense formulas written a second time."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from estimators import Bernoulli, Categorical, Gaussian, LinearizedLaplace
from estimators.curvature.builders import BUILDERS, GGNOptions
from estimators.curvature.fisher import Fisher, uniform_numbers
from estimators.data.batch import Batch
from estimators.errors import DerivativeRouteWarning, OptionError, StateError, TooLargeError, UnsupportedError
from estimators.likelihoods import CausalTokens
from estimators.models import Network

SEEDS = 100
STRUCTURES = ["kron", "ekfac", "diag", "full"]
structures = pytest.mark.parametrize("structure", STRUCTURES)
N, BATCH = 11, 4


class Pixels(nn.Module):
    """Three classes at each of two positions, (B, 3, 2), from two positions (B, 2, 3)."""

    def __init__(self):
        super().__init__()
        self.hidden, self.last = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.hidden(x))).transpose(1, 2)


class Tokens(Pixels):
    """Logits (B, 2, 3)."""

    def forward(self, x):
        return super().forward(x).transpose(1, 2)


def mlp(outputs=3):
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs))


def _ignoring(y):
    y = y.clone()
    y.flatten()[::3] = -100
    return y


def _case(name):
    """A likelihood, a network, inputs and targets."""
    x, positions = torch.randn(N, 3, dtype=torch.float64), torch.randn(N, 2, 3, dtype=torch.float64)
    classes, of_positions = torch.randint(0, 3, (N,)), torch.randint(0, 3, (N, 2))
    cases = {
        "gaussian": (Gaussian(sigma_noise=[0.6, 1.7, 3.0]), mlp(), x, torch.randn(N, 3, dtype=torch.float64)),
        "categorical": (Categorical(), mlp(), x, classes),
        "ignored rows": (Categorical(), mlp(), x, _ignoring(classes)),
        "pixels": (Categorical(class_dim=1), Pixels(), positions, _ignoring(of_positions)),
        "tokens": (CausalTokens(), Tokens(), positions, _ignoring(of_positions)),
        "bernoulli": (Bernoulli(), mlp(), x, torch.randint(0, 2, (N, 3)).double()),
    }
    likelihood, model, inputs, y = cases[name]
    return likelihood, model.double().eval(), inputs, y


LIKELIHOODS = ["gaussian", "categorical", "ignored rows", "pixels", "tokens", "bernoulli"]


def batches(x, y, size=BATCH):
    return list(zip(x.split(size), y.split(size), strict=True))


def fit(case, **options):
    likelihood, model, x, y = case
    return LinearizedLaplace(model, likelihood, prior_precision=2.5, **options).fit(batches(x, y))


def params_of(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def flat(tree, *leading):
    return torch.cat([leaf.reshape(*leading, -1) for leaf in tree.values()], dim=-1)


def label_gradients(case):
    """∂(−log p(yₙ | f(xₙ)))/∂θ of each row by autograd of the written-out loss, (N, P)."""
    likelihood, model, x, y = case

    def loss(params, row, target):
        f = functional_call(model, params, (row[None],))
        return likelihood.nll(f.flatten(1), target[None]).sum()

    rows = [grad(loss)(params_of(model), row, target) for row, target in zip(x, y, strict=True)]
    return torch.stack([flat(row) for row in rows])


def exact_ggn(case):
    """Σₙ JᵀΛJ with Λ by autograd twice of the written-out loss, (P, P)."""
    likelihood, model, x, y = case
    total = 0
    for row, target in zip(x, y, strict=True):
        f = functional_call(model, params_of(model), (row[None],)).detach().flatten(1)
        jacobian = jacrev(lambda p, row=row: functional_call(model, p, (row[None],)).flatten(1)[0])(params_of(model))
        rows = flat(jacobian, f.shape[1])
        hessian = torch.func.hessian(lambda f, target=target: likelihood.nll(f[None], target[None]).sum())(f[0])
        total = total + rows.T @ hessian @ rows
    return total


def dense(curvature, n_parameters):
    """A data curvature of any structure as a matrix (P, P)."""
    eye = torch.eye(n_parameters, dtype=torch.float64)
    inverse = curvature.precision(torch.ones(n_parameters, dtype=torch.float64)).solve(eye)
    return torch.linalg.inv(inverse) - eye


def unchecked(case):
    """The objective of the GGN with all rows in one batch, and without comparisons: hundreds of estimates are made."""
    objective = fit(case, hessian_structure="diag").objective_.centred(curvature="ggn")
    objective.network.check.enabled = False
    return replace(objective, batches=replace(objective.batches, stored=(Batch(*case[2:]),)))


def estimates(case, structure, n_seeds=SEEDS, **options):
    """Data curvatures of several seeds, (n_seeds, P, P), from one fit's data."""
    objective = unchecked(case)
    build = BUILDERS["ggn", structure, "cholesky" if structure == "full" else "eigen"]
    found = [build(objective, GGNOptions(Fisher("mc", seed=seed, **options)))[0] for seed in range(n_seeds)]
    return torch.stack([dense(curvature, objective.theta.numel()) for curvature in found])


def standard_errors(samples, exact):
    """|mean − exact| in standard errors of the mean, at entries that vary."""
    error = samples.std(0) / len(samples) ** 0.5
    scale = float(exact.abs().max())
    constant = error <= 1e-12 * scale
    assert torch.allclose(samples.mean(0)[constant], exact[constant], atol=1e-9 * scale)
    return ((samples.mean(0) - exact).abs() / error)[~constant]


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_sampled_gradients_have_mean_zero_and_the_covariance_of_the_hessian(name):
    likelihood, model, x, y = _case(name)
    f = model(x).detach().flatten(1)
    given, copies = likelihood.given(y), 4000
    keys = torch.arange(N * copies)  # each copy of a row has a sample of its own
    several = (f.repeat(copies, 1), (y.repeat(copies, *[1] * (y.ndim - 1)), keys))
    samples = Fisher("mc", seed=1).cotangents(likelihood, *several)[:, 0].unflatten(0, (copies, N))
    outer = torch.einsum("sbc,sbd->sbcd", samples, samples)
    assert float(standard_errors(outer, given.hessian(f)).max()) < 4.5
    assert float(standard_errors(samples, torch.zeros_like(f)).max()) < 4.5


@pytest.mark.parametrize(("name", "structure"), [("gaussian", "kron"), ("tokens", "diag"), ("categorical", "full")])
def test_the_mean_over_seeds_is_the_exact_curvature(name, structure):
    case = _case(name)
    exact = dense(fit(case, hessian_structure=structure).data_curvature_, case_size(case))
    assert float(standard_errors(estimates(case, structure), exact).max()) < 4


def case_size(case):
    return sum(p.numel() for p in case[1].parameters())


def test_more_samples_per_row_have_a_smaller_variance_and_the_same_mean():
    case = _case("categorical")
    one, four = (estimates(case, "full", n_seeds=80, mc_samples=k) for k in (1, 4))
    assert float(standard_errors(four, exact_ggn(case)).max()) < 4
    ratio = float(one.var(0).sum() / four.var(0).sum())
    assert 2.5 < ratio < 6


def test_the_eigenvalues_of_ekfac_are_unbiased_given_its_basis():
    """They come from other labels than the basis: with the same labels, they would be too large."""
    case = _case("categorical")
    objective = unchecked(case)
    exact, differences = exact_ggn(case), []
    for seed in range(80):
        found = BUILDERS["ggn", "ekfac", "eigen"](objective, GGNOptions(Fisher("mc", seed=seed)))[0]
        for name, block in found.blocks.items():
            (o, q), (e, r) = block.output_basis.shape, block.input_basis.shape
            vectors = torch.einsum("io,je->oeij", block.output_basis, block.input_basis).reshape(q * r, o, e)
            theta = vectors.new_zeros(q * r, len(exact))
            found.layout.put(theta, name, vectors)
            in_basis = torch.einsum("kp,pq,kq->k", theta, exact, theta).reshape(q, r)
            differences.append(((block.eigenvalues - in_basis) * torch.linspace(1, 2, q * r).reshape(q, r)).sum())
    found = torch.stack(differences).reshape(80, -1)
    assert float(standard_errors(found, torch.zeros(found.shape[1], dtype=torch.float64)).max()) < 4


def test_other_samples_are_those_after_the_first_ones():
    likelihood, model, x, y = _case("categorical")
    targets, f = (y, torch.arange(len(x))), model(x).detach()
    three = Fisher("mc", mc_samples=3, seed=1)
    both = [one.cotangents(likelihood, f, targets) * 3**0.5 for one in (three, three.with_other_samples())]
    six = Fisher("mc", mc_samples=6, seed=1).cotangents(likelihood, f, targets) * 6**0.5
    assert torch.allclose(torch.cat(both, dim=1), six)


@structures
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_empirical_fisher_is_the_sum_of_outer_products_of_the_gradients(name, structure):
    case = _case(name)
    gradients = label_gradients(case)
    found = fit(case, hessian_structure=structure, fisher="empirical")
    matrix = dense(found.data_curvature_, gradients.shape[1])
    assert torch.allclose(
        matrix.trace() if structure == "ekfac" else matrix.diagonal(),
        _expected(gradients, structure, matrix),
        rtol=1e-8,
    )
    if structure == "full":
        assert torch.allclose(matrix, gradients.T @ gradients, atol=1e-9)


def _expected(gradients, structure, matrix):
    if structure == "ekfac":  # a rotation within each layer keeps the trace
        return gradients.square().sum()
    return matrix.diagonal() if structure == "kron" else gradients.square().sum(0)


def test_kron_of_the_empirical_fisher_has_the_factors_of_the_label_gradients():
    likelihood, model, x, y = case = _case("gaussian")
    found = fit(case, hessian_structure="kron", fisher="empirical").data_curvature_.blocks["2.weight"]
    b = (model(x) - y).detach() / likelihood.sigma_noise.square()
    a = torch.cat([model[:2](x).detach(), torch.ones(N, 1, dtype=torch.float64)], dim=1)
    vectors = torch.kron(found.output_basis, found.input_basis)
    assert torch.allclose(
        vectors @ found.eigenvalues.flatten().diag() @ vectors.T, torch.kron(b.T @ b, a.T @ a) / N, atol=1e-9
    )


@structures
def test_sampled_labels_depend_neither_on_the_batches_nor_on_the_order(structure):
    likelihood, model, x, y = _case("categorical")
    x[3], x[4] = x[0], x[0]  # rows with equal inputs
    options = {"prior_precision": 2.5, "hessian_structure": structure, "fisher": "mc", "mc_samples": 2, "seed": 7}
    order = torch.randperm(N)
    found = [
        LinearizedLaplace(model, likelihood, **options).fit(loader).variance(x)
        for loader in (batches(x, y), batches(x[order], y[order], 3), batches(x.flip(0), y.flip(0), N))
    ]
    assert torch.allclose(found[0], found[1], rtol=1e-9)
    assert torch.allclose(found[0], found[2], rtol=1e-9)
    other = LinearizedLaplace(model, likelihood, **{**options, "seed": 8}).fit(batches(x, y))
    assert not torch.allclose(found[0], other.variance(x), rtol=1e-3)


def test_rows_with_equal_inputs_have_different_samples():
    case = _case("categorical")
    x = case[2][:1].expand(400, 3).clone()
    equal = (case[0], case[1], x, torch.zeros(400, dtype=torch.long))
    exact, sampled = (fit(equal, hessian_structure="diag", fisher=kind).data_curvature_ for kind in ("exact", "mc"))
    ratio = sampled.blocks["2.weight"].eigenvalues[:, -1] / exact.blocks["2.weight"].eigenvalues[:, -1]
    assert float((ratio - 1).abs().max()) < 0.5  # one label for all rows would have a relative error of 1 or more


def test_uniform_numbers_are_uniform_and_independent_of_their_neighbours():
    keys = torch.arange(2000)
    numbers = torch.cat([uniform_numbers(keys, 3, seed, sample) for seed in (0, 1) for sample in (0, 1)], dim=1)
    assert float(numbers.min()) > 0
    assert float(numbers.max()) < 1
    correlation = torch.corrcoef(numbers.T) - torch.eye(12, dtype=torch.float64)
    assert float(correlation.abs().max()) < 4.5 / 2000**0.5
    counts = torch.histc(numbers.flatten(), 20, 0, 1)
    assert float(((counts - 1200).square() / 1200).sum()) < 45  # χ² of 19 degrees of freedom


def pooled(rows, positions):
    """Deep linear networks whose outputs are averages over positions, and inputs."""
    linear = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), _Mean(1), nn.Linear(5, 2))
    convolution = nn.Sequential(nn.Conv1d(3, 4, 2), _Mean(2), nn.Linear(4, 2))
    return {
        "linear": (linear, torch.randn(rows, positions, 3)),
        "convolution": (convolution, torch.randn(rows, 3, positions)),
    }


class _Mean(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, x):
        return x.mean(self.dim)


def blocks_of(matrix, model):
    """The matrix without the entries between different layers."""
    layers, names = torch.empty(0), [name.split(".")[0] for name, p in model.named_parameters()]
    layers = torch.cat([torch.full((p.numel(),), int(n)) for n, p in zip(names, model.parameters(), strict=True)])
    return matrix * (layers[:, None] == layers[None])


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("structure", ["kron", "ekfac"])
def test_kfac_reduce_is_exact_for_a_deep_linear_network_with_average_pooling(kind, structure):
    model, x = pooled(N, 6)[kind]
    case = (Gaussian(sigma_noise=[0.6, 1.7]), model.double().eval(), x.double(), torch.randn(N, 2).double())
    exact = blocks_of(exact_ggn(case), model)
    reduced = fit(case, hessian_structure=structure, kfac_approx="reduce")
    assert torch.allclose(dense(reduced.data_curvature_, len(exact)), exact, atol=1e-9 * float(exact.max()))
    expanded = dense(fit(case, hessian_structure="kron").data_curvature_, len(exact))
    assert float((expanded - exact).norm() / exact.norm()) > 0.1


def test_kfac_expand_is_exact_for_a_deep_linear_network_whose_loss_sums_over_positions():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double().eval()
    x, y = torch.randn(N, 5, 3, dtype=torch.float64), torch.randn(N, 5, 2, dtype=torch.float64)
    case = (Gaussian(sigma_noise=0.6), model, x, y)
    exact = blocks_of(exact_ggn(case), model)
    expanded = dense(fit(case, hessian_structure="kron").data_curvature_, len(exact))
    assert torch.allclose(expanded, exact, atol=1e-9 * float(exact.max()))
    reduced = dense(fit(case, hessian_structure="kron", kfac_approx="reduce").data_curvature_, len(exact))
    assert float((reduced - exact).norm() / exact.norm()) > 0.1


def test_without_weight_sharing_expand_and_reduce_are_one():
    case = _case("categorical")
    one, other = (fit(case, hessian_structure="kron", kfac_approx=kind) for kind in ("expand", "reduce"))
    assert torch.allclose(one.variance(case[2]), other.variance(case[2]), rtol=1e-10)


class _Largest(TorchDispatchMode):
    """The largest number of entries of a tensor that is made inside."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        stored = [leaf.untyped_storage().nbytes() // leaf.element_size() for leaf in made]
        self.numel = max([self.numel, *stored])
        return result


@pytest.mark.parametrize("structure", ["kron", "diag"])
@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_many_classes_make_no_object_of_rows_times_classes_squared(structure, fisher):
    classes = 300
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, classes)).eval()
    x, y = torch.randn(32, 6), torch.randint(0, classes, (32,))
    with _Largest() as seen:
        estimator = LinearizedLaplace(model, "classification", hessian_structure=structure, fisher=fisher)
        estimator.fit(batches(x, y, 16))
    smallest_forbidden = min(16 * classes * classes, 32 * classes * sum(p.numel() for p in model.parameters()))
    assert (
        seen.numel <= 2 * classes * classes < smallest_forbidden
    )  # the factor of the last layer, and its eigenvectors


@pytest.mark.parametrize("positions", [1, 2])
@pytest.mark.parametrize("structure", ["kron", "ekfac"])
def test_stored_rows_of_many_outputs_are_as_good_as_their_matrix(positions, structure, monkeypatch):
    model = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Flatten(), nn.Linear(9 * positions, 2)).double().eval()
    x, y = torch.randn(4, positions, 4, dtype=torch.float64)[: 4 // positions], torch.tensor([0, 1, 1, 0])
    queries = torch.randn(5, positions, 4, dtype=torch.float64)
    case = (Categorical(), model, x, y[: len(x)])
    options = {"hessian_structure": structure, "fisher": "mc", "seed": 3}
    whole = fit(case, **options)
    monkeypatch.setattr("estimators.curvature.layerwise.blocks._MOST_DENSE_OUTPUTS", 1)
    few = fit(case, **options)
    assert few.precision_.blocks["0.weight"].output_basis.shape == (9, 4)
    if structure == "ekfac":  # eigenvalues outside the stored basis are those of the prior
        assert bool((few.variance(queries) >= whole.variance(queries) - 1e-12).all())
        return
    assert torch.allclose(few.variance(queries), whole.variance(queries))
    assert torch.allclose(few.covariance(queries), whole.covariance(queries))
    assert torch.allclose(few.precision_.log_det(), whole.precision_.log_det())
    eye = torch.eye(few.theta_.numel(), dtype=torch.float64)
    assert torch.allclose(few.precision_.solve(eye), whole.precision_.solve(eye), atol=1e-12)
    deviations = few.sample(queries[:1], 20000) - model(queries[:1]).detach()
    covariance = torch.einsum("kmc,kmd->mcd", deviations, deviations) / 20000
    exact = few.covariance(queries[:1])
    assert float((covariance - exact).norm() / exact.norm()) < 0.05


def test_a_factor_of_too_many_outputs_says_so_before_it_is_made(monkeypatch):
    case = _case("categorical")
    monkeypatch.setattr("estimators.curvature.layerwise.blocks._MOST_DENSE_OUTPUTS", 2)
    monkeypatch.setattr("estimators.runtime.memory.available_bytes", lambda *_: 100)
    with pytest.raises(TooLargeError, match="factor of 4"):
        fit(case, hessian_structure="kron")


@structures
@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_a_saved_fit_gives_the_same_numbers_and_is_rejected_by_other_options(structure, fisher, tmp_path):
    case = _case("categorical")
    options = {"hessian_structure": structure, "fisher": fisher}
    if structure in ("kron", "ekfac"):
        options["kfac_approx"] = "reduce"
    fitted = fit(case, **options)
    fitted.save(tmp_path / "fit")

    def same(**changes):
        return LinearizedLaplace(case[1], case[0], prior_precision=2.5, **{**options, **changes})

    assert torch.equal(same().load(tmp_path / "fit").variance(case[2]), fitted.variance(case[2]))
    others = [{"fisher": "exact"}]
    others += [{"mc_samples": 2}, {"seed": 1}] if fisher == "mc" else []
    others += [{"kfac_approx": "expand"}] if "kfac_approx" in options else []
    for changes in others:
        with pytest.raises(StateError):
            same(**changes).load(tmp_path / "fit")


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_another_noise_or_prior_is_a_new_fit_with_the_same_samples(fisher, structure):
    case = _case("gaussian")
    options = {"hessian_structure": structure, "fisher": fisher}
    fitted = fit((Gaussian(sigma_noise=0.6), *case[1:]), **options)
    changed = fitted.clone_with(likelihood=Gaussian(sigma_noise=1.9), prior_precision=0.7)
    new = LinearizedLaplace(case[1], Gaussian(sigma_noise=1.9), prior_precision=0.7, **options)
    assert torch.allclose(changed.variance(case[2]), new.fit(batches(*case[2:])).variance(case[2]), rtol=1e-8)


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("inverse", ["cholesky", "dual"])
@pytest.mark.parametrize("width", [4, 90])
def test_both_forms_of_the_full_structure_agree(fisher, inverse, width):
    """With 90 hidden units rows are stored in factors."""
    likelihood, _, x, y = _case("categorical")
    model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 3)).double().eval()
    case = (likelihood, model, x, y)
    found = fit(case, fisher=fisher, inverse=inverse)
    matrix = dense(fit(case, fisher=fisher).data_curvature_, case_size(case)) + 2.5 * torch.eye(case_size(case))
    jacobian = vmap(jacrev(lambda p, row: functional_call(model, p, (row,))), (None, 0))(params_of(model), x)
    rows = flat(jacobian, N, 3)
    assert torch.allclose(found.covariance(x), rows @ torch.linalg.inv(matrix) @ rows.transpose(1, 2), rtol=1e-7)
    assert found.jacobian_backend_ == ("layers" if width == 90 and inverse == "dual" else "torch.func")


@structures
@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_every_training_row_is_compared_with_plain_autograd(structure, fisher):
    found = fit(_case("tokens"), hessian_structure=structure, fisher=fisher, inverse="auto")
    rows = found.fit_report_.derivatives.rows
    assert max(rows.get("factors of layers", 0), rows.get("rows of Jᵀ u", 0)) >= N


def test_a_wrong_vectorised_route_is_replaced_by_plain_autograd(monkeypatch):
    case = _case("categorical")
    right = fit(case, fisher="mc").variance(case[2])
    original = Network._vectorised_vjp
    monkeypatch.setattr(Network, "_vectorised_vjp", lambda self, x, u: 1.01 * original(self, x, u))
    with pytest.warns(DerivativeRouteWarning, match="rows of Jᵀ u"):
        found = fit(case, fisher="mc")
    assert torch.allclose(found.variance(case[2]), right, rtol=1e-9)
    assert found.jacobian_backend_ == "autograd"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"fisher": "type-2"}, "fisher"),
        ({"fisher": "mc", "curvature": "hessian"}, "curvature"),
        ({"fisher": "mc", "hessian_structure": "lowrank"}, "lowrank"),
        ({"fisher": "empirical", "inverse": "cg"}, "cg"),
        ({"fisher": "mc", "inverse": "matrix_free_dual"}, "matrix_free_dual"),
        ({"mc_samples": 2}, "nothing is sampled"),
        ({"fisher": "empirical", "seed": 1}, "nothing is sampled"),
        ({"fisher": "mc", "mc_samples": 0}, "mc_samples"),
        ({"fisher": "mc", "seed": 0.5}, "seed"),
        ({"kfac_approx": "reduce"}, "kron"),
        ({"kfac_approx": "reduce", "hessian_structure": "diag"}, "kron"),
        ({"kfac_approx": "sum", "hessian_structure": "kron"}, "kfac_approx"),
    ],
)
def test_options_without_an_effect_or_a_form_are_rejected(options, match):
    with pytest.raises(OptionError, match=match):
        LinearizedLaplace(mlp(), "classification", **options)


class Heavy(Gaussian):
    """A likelihood with another noise, whose author has not written how to sample it."""

    def nll(self, f, y):
        return (f - y).abs().pow(1.5).sum(-1)


def test_a_likelihood_that_cannot_be_sampled_is_rejected():
    case = (Heavy(), *_case("gaussian")[1:])
    with pytest.raises(UnsupportedError, match="sample_labels"):
        fit(case, fisher="mc")
    gradients = label_gradients(case)
    found = fit(case, fisher="empirical")
    assert torch.allclose(dense(found.data_curvature_, gradients.shape[1]), gradients.T @ gradients, atol=1e-9)


def test_float32_samples_the_labels_of_float64():
    likelihood, model, x, y = _case("categorical")
    wide = fit((likelihood, model, x, y), hessian_structure="diag", fisher="mc").variance(x)
    with torch.random.fork_rng():
        narrow = fit((likelihood, model.float(), x.float(), y), hessian_structure="diag", fisher="exact")
    assert torch.isfinite(narrow.variance(x.float())).all()
    assert torch.isfinite(wide).all()
    extreme = replace(Fisher("mc"), mc_samples=3)
    found = extreme.cotangents(likelihood, torch.tensor([[80.0, 0.0, -80.0]]), (y[:1], torch.tensor([5])))
    assert float(found.abs().max()) < 1e-6  # a certain prediction samples its own class, without NaN
