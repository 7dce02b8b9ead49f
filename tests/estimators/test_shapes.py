"""Outputs of several dimensions a row, recurrent layers, lists of inputs, and functionals of outputs.

The reference is the Hessian of the loss of the linearised network, built by plain autograd from torch's own
cross-entropy with its own ignore_index.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from estimators import (
    Bernoulli,
    Categorical,
    Gaussian,
    LastLayerLaplace,
    LinearizedLaplace,
    LinearResponse,
    MeanAbsolute,
    NewtonRefit,
    ParameterProbes,
    Pointwise,
    PosteriorDraws,
    RegVar,
)
from estimators.errors import DataError, OptionError, UnsupportedError
from estimators.likelihoods import CausalTokens, resolve_likelihood
from estimators.models import next_token_log_probs
from estimators.models.functionals import next_token_logits

DELTA, SIGMA = 0.7, 0.6
EXACT = LinearResponse(tol=1e-12)


class Segmenter(nn.Module):
    """(B, 1, 3, 2) -> (B, 3, 3, 2): a class at every pixel, classes in front."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 3, 1))

    def forward(self, x):
        return self.layers(x)


class Tagger(nn.Module):
    """Tokens (B, T) -> (B, T, 4), each seeing those before it, with a linear layer at the end."""

    def __init__(self):
        super().__init__()
        self.embedding, self.recurrent, self.head = nn.Embedding(4, 3), nn.GRU(3, 3, batch_first=True), nn.Linear(3, 4)

    def forward(self, input_ids, attention_mask=None):  # noqa: ARG002
        return self.head(self.recurrent(self.embedding(input_ids))[0])


class Recurrent(nn.Module):
    """(B, T, 2) -> (B, 2) by a recurrent layer of the kind asked for."""

    def __init__(self, kind, width=3, **options):
        super().__init__()
        self.recurrent = kind(2, width, batch_first=True, **options)
        self.head = nn.Linear(2 * width if options.get("bidirectional") else width, 2)

    def forward(self, x):
        return self.head(self.recurrent(x)[0][:, -1])


class TwoInputs(nn.Module):
    """A list of two inputs."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(2, 3), nn.Linear(3, 3)

    def forward(self, x):
        a, b = x
        return torch.tanh(self.left(a)) * self.right(b)


def double(model):
    return model.double().eval()


def segmentation():
    torch.manual_seed(0)
    model, x = double(Segmenter()), torch.randn(7, 1, 3, 2).double()
    y = torch.randint(0, 3, (7, 3, 2))
    y[1], y[2, 0] = -100, -100  # a row without labels, and a line of pixels
    return model, x, y, Categorical(class_dim=1), lambda f, y: F.cross_entropy(f, y, reduction="sum")


def tags():
    torch.manual_seed(1)
    model, x = double(Tagger()), {"input_ids": torch.randint(0, 4, (7, 5))}
    y = torch.randint(0, 4, (7, 5))
    y[0, 3:] = -100
    return model, x, y, "classification", lambda f, y: F.cross_entropy(f.movedim(-1, 1), y, reduction="sum")


def language():
    model, x, _, _, _ = tags()
    y = x["input_ids"].clone()
    y[0, 3:] = -100
    mask = (y != -100).long()

    def loss(f, y):  # as in the Hugging Face models: the places but the last predict the tokens but the first
        return F.cross_entropy(f[:, :-1].movedim(-1, 1), y[:, 1:], reduction="sum")

    return model, {**x, "attention_mask": mask}, y, "causal_lm", loss


def images():
    model, x, _, _, _ = segmentation()
    y = torch.randn(7, 3, 3, 2).double()
    return model, x, y, Gaussian(SIGMA), lambda f, y: 0.5 * ((f - y) / SIGMA).square().sum()


def masks():
    model, x, _, _, _ = segmentation()
    y = torch.randint(0, 2, (7, 3, 3, 2)).double()
    return model, x, y, Bernoulli(), lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="sum")


CASES = {"segmentation": segmentation, "tags": tags, "language": language, "images": images, "masks": masks}


def rows_of(x, start, stop):
    return {name: t[start:stop] for name, t in x.items()} if isinstance(x, dict) else x[start:stop]


def loader(x, y):
    """Batches of 3 rows: they do not divide 7."""
    return [(rows_of(x, i, i + 3), y[i : i + 3]) for i in range(0, len(y), 3)]


class Reference:
    """f, J by plain autograd, and A = Hessian of the loss of the linearised network + δ."""

    def __init__(self, model, loss):
        self.model, self.loss = model, loss
        self.theta = torch.cat([p.detach().flatten() for p in model.parameters()])

    def _f(self, theta, x):
        params, at = {}, 0
        for name, p in self.model.named_parameters():
            params[name], at = theta[at : at + p.numel()].view_as(p), at + p.numel()
        arguments, keywords = ((), x) if isinstance(x, dict) else ((x,), {})
        return torch.func.functional_call(self.model, params, arguments, keywords)

    def jacobian(self, x):
        """(M, C, P), all outputs of a row in C."""
        j = torch.autograd.functional.jacobian(lambda theta: self._f(theta, x), self.theta)
        return j.reshape(len(j), -1, len(self.theta))

    def precision(self, x, y):
        f, j = self._f(self.theta, x).detach(), self.jacobian(x)

        def linearised(d):
            return self.loss(f + (j @ d).view_as(f), y) + 0.5 * DELTA * d.square().sum()

        return torch.autograd.functional.hessian(linearised, torch.zeros_like(self.theta))

    def covariance(self, x, y, at):
        j = self.jacobian(at)
        return j @ torch.linalg.inv(self.precision(x, y)) @ j.transpose(1, 2)


@pytest.fixture(params=CASES, name="case")
def _case(request):
    return CASES[request.param]()


def test_the_likelihood_is_torchs_own_loss(case):
    model, x, y, likelihood, loss = case
    f = model(**x) if isinstance(x, dict) else model(x)
    resolved = resolve_likelihood(likelihood)
    constant = (
        resolved.nll(torch.zeros_like(f).flatten(1), torch.zeros_like(f)).sum() if "Gauss" in str(resolved) else 0
    )
    assert torch.allclose(resolved.nll(f.flatten(1), y).sum() - constant, loss(f, y))


def test_masked_self_targets_have_no_slope_at_the_trained_weights(case):
    model, x, y, likelihood, _ = case
    estimator = RegVar(model, likelihood, prior_precision=DELTA, regularizer=Pointwise(), solver=EXACT)
    objective = estimator.fit(loader(x, y)).refit_objective_
    assert objective.gradient(objective.theta).abs().max() < 1e-12


@pytest.mark.parametrize("inverse", ["cholesky", "dual", "cg"])
def test_exact_laplace_of_outputs_of_several_dimensions(case, inverse):
    model, x, y, likelihood, loss = case
    estimator = LinearizedLaplace(model, likelihood, prior_precision=DELTA, inverse=inverse).fit(loader(x, y))
    query = rows_of(x, 2, 5)
    covariance = Reference(model, loss).covariance(x, y, query)
    variance = estimator.variance(query)
    assert variance.shape == (model(**query) if isinstance(query, dict) else model(query)).shape
    assert torch.allclose(variance.flatten(1), covariance.diagonal(dim1=1, dim2=2), rtol=1e-7)
    assert torch.allclose(estimator.covariance(query), covariance, rtol=1e-7, atol=1e-9)


def test_diagonal_laplace_has_the_diagonal_of_the_dense_ggn(case):
    model, x, y, likelihood, loss = case
    estimator = LinearizedLaplace(model, likelihood, prior_precision=DELTA, hessian_structure="diag")
    reference = Reference(model, loss)
    j = reference.jacobian(rows_of(x, 2, 5))
    expected = (j.square() / reference.precision(x, y).diagonal()).sum(-1)
    assert torch.allclose(estimator.fit(loader(x, y)).variance(rows_of(x, 2, 5)).flatten(1), expected)


@pytest.mark.parametrize("solver", [EXACT, NewtonRefit()], ids=["response", "refit"])
def test_pointwise_regvar_is_exact_laplace(case, solver):
    model, x, y, likelihood, loss = case
    query = rows_of(x, 2, 4 if solver is EXACT else 3)  # each of the 18 or 20 outputs of a row is a refit
    estimator = RegVar(model, likelihood, prior_precision=DELTA, regularizer=Pointwise(), solver=solver)
    expected = Reference(model, loss).covariance(x, y, query).diagonal(dim1=1, dim2=2)
    found = estimator.fit(loader(x, y)).variance(query).flatten(1)
    assert torch.allclose(found, expected, rtol=1e-7 if solver is EXACT else 1e-4)


def test_posterior_draws_have_the_covariance(case):
    """4000 draws: each mean square within five standard errors √(2/K) of the exact variance."""
    model, x, y, likelihood, loss = case
    draws = PosteriorDraws(4000, seed=1, rao_blackwell=None, variance_estimate="monte_carlo")
    estimator = RegVar(model, likelihood, prior_precision=DELTA, regularizer=draws, solver=EXACT).fit(loader(x, y))
    expected = Reference(model, loss).covariance(x, y, rows_of(x, 0, 2)).diagonal(dim1=1, dim2=2)
    ratio = estimator.variance(rows_of(x, 0, 2)).flatten(1) / expected
    assert (ratio - 1).abs().max() < 5 * (2 / 4000) ** 0.5
    assert estimator.sample(rows_of(x, 0, 2), 3).shape == (3, *estimator.variance(rows_of(x, 0, 2)).shape)


@pytest.mark.parametrize("regularizer", [MeanAbsolute(), ParameterProbes(3)], ids=str)
def test_regularizers_at_fit_keep_the_shape(case, regularizer):
    model, x, y, likelihood, _ = case
    estimator = RegVar(model, likelihood, prior_precision=DELTA, regularizer=regularizer, solver=EXACT)
    query = rows_of(x, 2, 5)
    shape = (model(**query) if isinstance(query, dict) else model(query)).shape
    assert estimator.fit(loader(x, y)).variance(query).shape == shape


def test_ignored_labels_do_not_matter(case):
    model, x, y, likelihood, _ = case
    if y.is_floating_point():
        pytest.skip("no label is ignored in regression")
    whole = LinearizedLaplace(model, likelihood, prior_precision=DELTA).fit(loader(x, y))
    some = y[:, 1:] == -100 if likelihood == "causal_lm" else y == -100
    assert some.any()
    assert (whole.log_marginal_likelihood() < 0).item()
    kept = [i for i in range(7) if not (y[i] == -100).all()]
    rows = {name: t[kept] for name, t in x.items()} if isinstance(x, dict) else x[kept]
    without = LinearizedLaplace(model, likelihood, prior_precision=DELTA).fit(loader(rows, y[kept]))
    assert torch.allclose(whole.variance(rows_of(x, 2, 5)), without.variance(rows_of(x, 2, 5)))


@pytest.mark.parametrize("name", ["segmentation", "tags"])
def test_probabilities_lie_along_the_class_dimension(name):
    model, x, y, likelihood, _ = CASES[name]()
    estimator = LinearizedLaplace(model, likelihood, prior_precision=DELTA).fit(loader(x, y))
    dim = 1 if name == "segmentation" else -1
    for prediction in (estimator.predict(x), estimator.predict(x, link_approx="mc", n_samples=3)):
        assert torch.allclose(prediction.probs.sum(dim), torch.ones_like(y).double())
        assert prediction.entropy.shape == y.shape
    sharper = estimator.predict(x).calibrated(softmax_temperature=0.1)
    assert (sharper.entropy <= estimator.predict(x).entropy + 1e-9).all()
    assert torch.allclose(sharper.probs.sum(dim), torch.ones_like(y).double())


@pytest.mark.parametrize(
    ("y", "match"),
    [
        (torch.zeros(7, 6, dtype=torch.int64), r"\(3, 3, 2\).*\(3, 3, 3, 2\)"),
        (torch.full((7, 3, 2), 3), "0..2"),
        (torch.full((7, 3, 2), -1), "0..2"),
        (torch.zeros(7, 3, 2), "integer"),
    ],
    ids=["shape", "large", "negative", "float"],
)
def test_labels_that_do_not_fit_are_rejected(y, match):
    model, x, _, likelihood, _ = segmentation()
    with pytest.raises(DataError, match=match):
        LinearizedLaplace(model, likelihood).fit(loader(x, y))


def test_class_dim_is_named_where_it_is_missing():
    model, x, y, _, _ = segmentation()
    with pytest.raises(DataError, match="class_dim=1"):
        LinearizedLaplace(model, "classification").fit(loader(x, y))
    with pytest.raises(OptionError, match="class_dim"):
        Categorical(class_dim=2)
    with pytest.raises(UnsupportedError, match="B, T, V"):
        CausalTokens().check_targets(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))


def test_auto_skips_rao_blackwellisation_for_many_outputs_per_row_and_says_so():
    model, x, y, likelihood, _ = tags()
    estimator = RegVar(model, likelihood, regularizer=PosteriorDraws(2), solver=EXACT).fit(loader(x, y))
    assert "none: expected features of shape (B, D)" in estimator.rao_blackwell_
    closed = LastLayerLaplace(model, likelihood).fit(loader(x, y))  # which needs no block of a row
    other = LinearizedLaplace(model, likelihood, subset_of_weights="last_layer").fit(loader(x, y))
    assert torch.allclose(closed.variance(x), other.variance(x), rtol=1e-8)


def next_token_slopes(model, x, function):
    """G of the tests' own: by autograd of each chosen entry."""
    f = model(**x).detach().requires_grad_()
    chosen = function(f)[:, :-1].gather(-1, x["input_ids"][:, 1:, None])[..., 0] * x["attention_mask"][:, 1:]
    rows = [torch.autograd.grad(chosen[:, t].sum(), f, retain_graph=True)[0].flatten(1) for t in range(chosen.shape[1])]
    return torch.stack(rows, 1)


@pytest.mark.parametrize(
    ("functional", "function"),
    [(next_token_logits, lambda f: f), (next_token_log_probs, lambda f: f.log_softmax(-1))],
    ids=["logits", "log_probs"],
)
@pytest.mark.filterwarnings("ignore::estimators.errors.DiagonalWeightsWarning")
@pytest.mark.parametrize("method", ["cholesky", "dual", "kron", "pointwise", "draws"])
def test_the_variance_of_chosen_tokens_is_that_of_the_delta_method(functional, function, method):
    model, x, y, likelihood, _ = language()
    estimators = {
        "cholesky": lambda: LinearizedLaplace(model, likelihood, prior_precision=DELTA, inverse="cholesky"),
        "dual": lambda: LinearizedLaplace(model, likelihood, prior_precision=DELTA, inverse="dual"),
        "kron": lambda: LinearizedLaplace(model, likelihood, prior_precision=DELTA, hessian_structure="kron"),
        "pointwise": lambda: RegVar(model, likelihood, prior_precision=DELTA, regularizer=Pointwise(), solver=EXACT),
        "draws": lambda: RegVar(
            model, likelihood, prior_precision=DELTA, regularizer=PosteriorDraws(5, rao_blackwell=None), solver=EXACT
        ),
    }
    estimator = estimators[method]().fit(loader(x, y))
    slopes = next_token_slopes(model, x, function)
    expected = torch.einsum("mdc,mce,mde->md", slopes, estimator.covariance(x), slopes)
    assert expected[0, 2:].abs().max() == 0  # padding
    assert expected[1:].min() > 0
    assert torch.allclose(estimator.variance(x, of=functional), expected, rtol=1e-6, atol=1e-12)


def margin(f):
    return f[0] - f[1]


@pytest.mark.parametrize("variance_estimate", ["monte_carlo", "bounds"])
@pytest.mark.parametrize("rao_blackwell", ["last_layer", None])
def test_draws_and_bounds_give_the_variance_of_a_functional(variance_estimate, rao_blackwell):
    torch.manual_seed(0)
    model = double(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)))
    x, y = torch.randn(20, 3).double(), torch.randint(0, 3, (20,))
    regularizer = PosteriorDraws(3, rao_blackwell=rao_blackwell, variance_estimate=variance_estimate)
    solver = LinearResponse(tol=1e-12, max_iter=4) if variance_estimate == "monte_carlo" else LinearResponse()
    solver = EXACT if variance_estimate == "monte_carlo" else solver
    estimator = RegVar(model, "classification", prior_precision=DELTA, regularizer=regularizer, solver=solver)
    estimator.fit([(x[i : i + 6], y[i : i + 6]) for i in range(0, 20, 6)])
    slope = torch.tensor([[1.0, -1.0, 0.0]]).double()
    expected = torch.einsum("dc,mce,de->md", slope, estimator.covariance(x[:4]), slope)
    assert torch.allclose(estimator.variance(x[:4], of=margin), expected, rtol=1e-8)
    assert torch.allclose(estimator.variance(x[:4], of=lambda f: f), estimator.variance(x[:4]), rtol=1e-8)


def test_one_functional_at_a_time():
    model, x, y, likelihood, _ = segmentation()
    estimator = RegVar(model, likelihood, regularizer=Pointwise(of=torch.sum), solver=EXACT).fit(loader(x, y))
    assert estimator.variance(x[:2]).shape == (2, 1)
    with pytest.raises(OptionError, match="one functional"):
        estimator.variance(x[:2], of=torch.mean)
    probes = RegVar(model, likelihood, regularizer=ParameterProbes(2), solver=EXACT).fit(loader(x, y))
    with pytest.raises(UnsupportedError, match="functional"):
        probes.variance(x[:2], of=torch.mean)


RECURRENT = [nn.LSTM, nn.GRU, nn.RNN]
DEPTHS = {"plain": {}, "deep": {"bidirectional": True, "num_layers": 2}}


@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize("options", DEPTHS.values(), ids=DEPTHS)
def test_recurrent_networks(kind, options):
    torch.manual_seed(0)
    model = double(Recurrent(kind, **options))
    x, y = torch.randn(7, 4, 2).double(), torch.randint(0, 2, (7,))
    reference = Reference(model, lambda f, y: F.cross_entropy(f, y, reduction="sum"))
    expected = reference.covariance(x, y, x[:3]).diagonal(dim1=1, dim2=2)
    exact = LinearizedLaplace(model, "classification", prior_precision=DELTA).fit(loader(x, y))
    assert torch.allclose(exact.variance(x[:3]), expected, rtol=1e-7)
    assert type(model.recurrent) is kind


def refits_of_recurrent_networks():
    """Every pair of a layer, a depth and a curvature; the rest is nightly."""
    for i, kind in enumerate(RECURRENT):
        for j, depth in enumerate(DEPTHS):
            for k, curvature in enumerate(["ggn", "hessian"]):
                marks = () if k != (i + j) % 2 else (pytest.mark.verification,)
                yield pytest.param(
                    kind, DEPTHS[depth], curvature, marks=marks, id=f"{curvature}-{depth}-{kind.__name__}"
                )


@pytest.mark.parametrize(("kind", "options", "curvature"), list(refits_of_recurrent_networks()))
def test_refits_of_recurrent_networks(kind, options, curvature):
    torch.manual_seed(0)
    model = double(Recurrent(kind, width=2, **options))
    x, y = torch.randn(7, 2, 2).double(), torch.randint(0, 2, (7,))
    parts = {"prior_precision": 20.0, "curvature": curvature}  # the exact Hessian is positive definite
    laplace = LinearizedLaplace(model, "classification", **parts)
    regvar = RegVar(model, "classification", regularizer=Pointwise(), solver=NewtonRefit(), **parts)
    found, wanted = (e.fit(loader(x, y)).variance(x[:1]) for e in (regvar, laplace))
    assert torch.allclose(found, wanted, rtol=1e-4)
    assert type(model.recurrent) is kind


@pytest.mark.filterwarnings("ignore::estimators.errors.DiagonalWeightsWarning")
@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag"])
def test_structured_laplace_of_a_recurrent_network_runs(structure):
    model, x, y, likelihood, loss = tags()
    estimator = LinearizedLaplace(model, likelihood, prior_precision=DELTA, hessian_structure=structure)
    variance = estimator.fit(loader(x, y)).variance(x)
    exact = Reference(model, loss).covariance(x, y, x).diagonal(dim1=1, dim2=2).view_as(variance)
    assert 0.5 < (variance / exact).median() < 2


def test_a_list_of_inputs():
    torch.manual_seed(0)
    model = double(TwoInputs())
    a, b, y = torch.randn(7, 2).double(), torch.randn(7, 3).double(), torch.randint(0, 3, (7,))
    reference = Reference(model, lambda f, y: F.cross_entropy(f, y, reduction="sum"))
    batches = [([a[i : i + 3], b[i : i + 3]], y[i : i + 3]) for i in range(0, 7, 3)]
    exact = LinearizedLaplace(model, "classification", prior_precision=DELTA).fit(batches)
    expected = reference.covariance([a, b], y, [a[:3], b[:3]]).diagonal(dim1=1, dim2=2)
    assert torch.allclose(exact.variance([a[:3], b[:3]]), expected, rtol=1e-7)
    regvar = RegVar(model, "classification", prior_precision=DELTA, regularizer=Pointwise(), solver=NewtonRefit())
    assert torch.allclose(regvar.fit(batches).variance([a[:3], b[:3]]), expected, rtol=1e-4)
