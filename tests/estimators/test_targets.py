"""Targets that are soft, ignored, missing or masked; and errors about data that name batch and row."""

from math import inf, nan

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
    NewtonRefit,
    Pointwise,
    PosteriorDraws,
    RegVar,
    SplitConformal,
    optimize_prior_precision,
    tune,
)
from estimators.baselines.laplace_torch import LaplaceTorch
from estimators.baselines.multi_head import MultiHeadEnsemble
from estimators.baselines.temperature import TemperatureScaling
from estimators.calibration.scores import negative_log_predictive
from estimators.diagnostics import diagnose
from estimators.errors import DataError, OptionError
from estimators.likelihoods import Likelihood
from estimators.training import Recipe, train_map

DELTA = 0.7
EXACT = LinearResponse(tol=1e-12)
C = 3


def mlp(outputs=C):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double().eval()


def inputs(n=20):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def batches(x, y, size=6):
    return list(zip(x.split(size), y.split(size), strict=True))


ESTIMATORS = {
    "cholesky": lambda *a, **k: LinearizedLaplace(*a, inverse="cholesky", **k),
    "hessian": lambda *a, **k: LinearizedLaplace(*a, curvature="hessian", **k),
    "dual": lambda *a, **k: LinearizedLaplace(*a, inverse="dual", **k),
    "cg": lambda *a, **k: LinearizedLaplace(*a, inverse="cg", **k),
    "diagonal": lambda *a, **k: LinearizedLaplace(*a, hessian_structure="diag", **k),
    "kron": lambda *a, **k: LinearizedLaplace(*a, hessian_structure="kron", **k),
    "last layer": LastLayerLaplace,
    "last layer kron": lambda *a, **k: LastLayerLaplace(*a, hessian_structure="kron", **k),
    "pointwise": lambda *a, **k: RegVar(*a, regularizer=Pointwise(), solver=EXACT, **k),
    "refit": lambda *a, **k: RegVar(*a, regularizer=Pointwise(), solver=NewtonRefit(), **k),
}


def soft(likelihood):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(20, C, generator=generator, dtype=torch.float64)
    return logits.softmax(-1) if likelihood == "classification" else logits.sigmoid()


def hessian_of(model, likelihood, x, y):
    """∇²L by autograd of torch's own loss."""
    shapes = [(name, p.shape) for name, p in model.named_parameters()]

    def loss(theta):
        parts = dict(zip(dict(shapes), theta.split([s.numel() for _, s in shapes]), strict=True))
        f = torch.func.functional_call(model, {name: parts[name].view(s) for name, s in shapes}, (x,))
        torchs = F.cross_entropy if likelihood == "classification" else F.binary_cross_entropy_with_logits
        return torchs(f, y, reduction="sum") + 0.5 * DELTA * theta.square().sum()

    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    return torch.autograd.functional.hessian(loss, theta)


@pytest.mark.parametrize("likelihood", ["classification", "binary"])
def test_soft_targets_give_torchs_own_loss_and_its_hessian(likelihood):
    model, x, y = mlp(), inputs(), soft(likelihood)
    resolved = Categorical() if likelihood == "classification" else Bernoulli()
    f = model(x)
    own = F.cross_entropy(f, y) if likelihood == "classification" else F.binary_cross_entropy_with_logits(f, y) * C
    assert torch.allclose(resolved.nll(f, y).mean(), own)
    estimator = LinearizedLaplace(model, likelihood, prior_precision=DELTA, curvature="hessian")
    hessian = hessian_of(model, likelihood, x, y)
    delta = DELTA + max(0.0, 1 - float(torch.linalg.eigvalsh(hessian).min()))  # positive definite away from the optimum
    shifted = hessian + (delta - DELTA) * torch.eye(len(hessian)).double()
    estimator = LinearizedLaplace(model, likelihood, prior_precision=delta, curvature="hessian").fit(batches(x, y))
    f = model(x[:3])
    rows = [torch.autograd.grad(out, list(model.parameters()), retain_graph=True) for out in f.flatten()]
    j = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).view(3, C, -1)
    expected = (j @ torch.linalg.inv(shifted) @ j.transpose(1, 2)).diagonal(dim1=1, dim2=2)
    assert torch.allclose(estimator.variance(x[:3]), expected, rtol=1e-8)


@pytest.mark.parametrize("likelihood", ["classification", "binary"])
@pytest.mark.parametrize("estimator", sorted(set(ESTIMATORS) - {"hessian"}))
def test_the_ggn_of_soft_targets_is_that_of_hard_ones(estimator, likelihood):
    """Λ does not depend on the targets."""
    model, x, y = mlp(), inputs(), soft(likelihood)
    hard = y.argmax(-1) if likelihood == "classification" else y.round()
    found, expected = (
        ESTIMATORS[estimator](model, likelihood, prior_precision=DELTA).fit(batches(x, y)).variance(x[:3])
        for y in (y, hard)
    )
    assert torch.allclose(found, expected, rtol=1e-9)


def test_the_evidence_and_the_score_of_soft_targets_are_cross_entropies():
    model, x, y = mlp(), inputs(), soft("classification")
    one_hot = F.one_hot(y.argmax(-1), C).double()
    laplace = LinearizedLaplace(model, "classification", prior_precision=DELTA)
    hard, as_soft = (laplace.fit(batches(x, y)).log_marginal_likelihood() for y in (y.argmax(-1), one_hot))
    assert torch.allclose(hard, as_soft)
    prediction = laplace.predict(x)
    found = negative_log_predictive(prediction, y)
    assert torch.allclose(found, -(y * prediction.probs.log()).sum(-1))
    binary = LinearizedLaplace(model, "binary", prior_precision=DELTA).fit(batches(x, soft("binary"))).predict(x)
    p, y = binary.probs, soft("binary")
    assert torch.allclose(negative_log_predictive(binary, y), -(y * p.log() + (1 - y) * (1 - p).log()).flatten())


def test_training_on_soft_targets_ends_where_the_predicted_means_are_theirs():
    """Without a prior on the bias, the mean prediction of a linear model is the mean target."""
    model, x, y = nn.Linear(4, C).double(), inputs(), soft("classification")
    recipe = Recipe(epochs=2000, batch_size=20, lr=0.05)
    train_map(model, "classification", batches(x, y), prior_precision={"weight": 1.0, "bias": 0.0}, recipe=recipe)
    assert torch.allclose(model(x).softmax(-1).mean(0), y.mean(0), atol=1e-4)


def with_ignored(ignored=-100):
    """Rows 0, 7 and 12 to 17 (a whole batch) have no label."""
    y = torch.arange(20) % C
    y[[0, 7, *range(12, 18)]] = ignored
    return inputs(), y, y != ignored


@pytest.mark.parametrize("ignored", [-100, -1])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_rows_without_a_label_are_counted_and_change_nothing_else(estimator, ignored):
    model, (x, y, kept) = mlp(), with_ignored(ignored)
    likelihood = Categorical(ignore_index=ignored)
    delta = 20.0 if estimator == "hessian" else DELTA
    make = ESTIMATORS[estimator]
    whole = make(model, likelihood, prior_precision=delta).fit(batches(x, y))
    without = make(model, likelihood, prior_precision=delta).fit(batches(x[kept], y[kept]))
    assert whole.n_data_ == 20
    rtol = 1e-5 if estimator == "refit" else 1e-8
    found, expected = whole.variance(x[:3]), without.variance(x[:3])
    if "kron" in estimator:  # its factors are means over what each layer sees: the rows without a label, too
        assert torch.isfinite(found).all()
    else:
        assert torch.allclose(found, expected, rtol=rtol)
    if estimator == "cholesky":
        assert torch.allclose(whole.log_marginal_likelihood(), without.log_marginal_likelihood())
        loss = F.cross_entropy(model(x), y, reduction="none", ignore_index=ignored)
        assert torch.allclose(likelihood.nll(model(x), y), loss)
        scores = negative_log_predictive(whole.predict(x), y, likelihood)
        assert torch.allclose(scores, -whole.predict(x).probs[kept, y[kept]].log())


def test_posterior_draws_have_no_noise_from_rows_without_a_label():
    model, (x, y, kept) = mlp(), with_ignored()
    draws = PosteriorDraws(4000, seed=1, rao_blackwell=None, variance_estimate="monte_carlo")
    regvar = RegVar(model, "classification", prior_precision=DELTA, regularizer=draws, solver=EXACT)
    found = regvar.fit(batches(x, y)).variance(x[:2])
    expected = LinearizedLaplace(model, "classification", prior_precision=DELTA).fit(batches(x[kept], y[kept]))
    assert (found / expected.variance(x[:2]) - 1).abs().max() < 5 * (2 / 4000) ** 0.5


def test_other_methods_take_rows_without_a_label_or_say_that_they_cannot():
    model, (x, y, _) = mlp(), with_ignored()
    assert MultiHeadEnsemble(model, "classification", n_heads=3).fit(batches(x, y)).variance(x[:2]).shape == (2, C)
    with pytest.raises(OptionError, match="-100"):
        LaplaceTorch(model, "classification").fit(batches(x, y))
    names = {finding.name for finding in diagnose(model, "classification", batches(x, y)).findings}
    assert "class balance" in names


class MaskedGaussian(Gaussian):
    """What the error about missing targets says to write: −999 stands for a target that is missing."""

    def given(self, y):
        observed = y.flatten(1) != -999
        return self if bool(observed.all()) else _Observed(self, observed.double())

    def nll(self, f, y):
        likelihood = self.given(y)
        return super().nll(f, y) if likelihood is self else likelihood.nll(f, y)


class _Observed(Likelihood):
    """Only the observed outputs."""

    kind = "regression"

    def __init__(self, whole, observed):
        self.whole, self.observed = whole, observed

    def nll(self, f, y):
        return 0.5 * (self.observed * (f - y)).square().sum(-1)

    def expected_nll(self, f, f_ref):
        return self.whole.expected_nll(self.observed * f, self.observed * f_ref)

    def root_product(self, f, v):
        return self.whole.root_product(f, self.observed * v)

    def hessian_product(self, f, v):
        return self.whole.hessian_product(f, self.observed * v)

    def check_targets(self, f, y):
        self.whole.check_targets(f, y)

    def predict(self, mean, variance, samples):
        return self.whole.predict(mean, variance, samples)


@pytest.mark.parametrize("estimator", ["cholesky", "dual", "cg", "pointwise", "diagonal"])
def test_missing_targets_of_several_tasks_are_left_out_by_a_likelihood_as_the_error_says(estimator):
    model, x = mlp(2), inputs()
    y = torch.randn(20, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    y[::3, 0], y[4, 1] = nan, nan
    with pytest.raises(DataError, match=r"row 0.*batch 0.*-999.*given\(y\)"):
        LinearizedLaplace(model, "regression").fit(batches(x, y))
    found = ESTIMATORS[estimator](model, MaskedGaussian(), prior_precision=DELTA).fit(batches(x, y.nan_to_num(-999)))
    f = model(x)
    rows = [torch.autograd.grad(out, list(model.parameters()), retain_graph=True) for out in f.flatten()]
    j = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).view(20, 2, -1)
    seen = j[~y.isnan()]
    a = seen.T @ seen + DELTA * torch.eye(seen.shape[-1])
    a = a.diagonal().diag() if estimator == "diagonal" else a
    expected = (j[:3] @ torch.linalg.inv(a) @ j[:3].transpose(1, 2)).diagonal(dim1=1, dim2=2)
    assert torch.allclose(found.variance(x[:3]), expected, rtol=1e-7)


def test_validation_rows_with_missing_targets_are_rejected_instead_of_scored():
    """The density of the target −999 would be in the score, and the noise would be scaled up to it."""
    model, x = mlp(2), inputs()
    y = torch.randn(20, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    missing = y.clone()
    missing[::3, 0] = -999
    laplace = LinearizedLaplace(model, MaskedGaussian(), prior_precision=DELTA)
    with pytest.raises(DataError, match=r"a target for every output.*MaskedGaussian\.given"):
        laplace.fit(batches(x, missing), val_loader=batches(x, missing))
    fitted = laplace.fit(batches(x, missing))
    for choose in (tune, optimize_prior_precision):
        with pytest.raises(DataError, match="a target for every output"):
            choose(fitted, batches(x, missing))
    with pytest.raises(DataError, match="a target for every output"):
        SplitConformal(fitted).fit(batches(x, missing))
    calibrated = laplace.fit(batches(x, missing), val_loader=batches(x, y))
    plain = negative_log_predictive(calibrated.predict(x), y)
    assert torch.equal(negative_log_predictive(calibrated.predict(x), y, MaskedGaussian()), plain)


def spoil(tensor, value, row):
    tensor = tensor.clone()
    tensor[row] = value
    return tensor


X = inputs()
BAD = {  # in row 3 of batch 2: 15 of 20, in batches of 6
    "NaN in x": (spoil(X, nan, 15), torch.arange(20) % C, "classification"),
    "Inf in x": (spoil(X, inf, 15), torch.arange(20) % C, "classification"),
    "a label beyond the classes": (X, spoil(torch.arange(20) % C, C, 15), "classification"),
    "a negative label": (X, spoil(torch.arange(20) % C, -1, 15), "classification"),
    "soft targets": (X, spoil(soft("classification"), 0.5, 15), "classification"),
    "a binary label": (X, spoil(soft("binary"), 2.0, 15), "binary"),
    "NaN in y": (X, spoil(soft("binary"), nan, 15), "regression"),
}


def train(model, likelihood, loader):
    return train_map(model, likelihood, loader, prior_precision=1.0, recipe=Recipe(epochs=2, batch_size=5, lr=0.1))


def fit(model, likelihood, loader):
    return LinearizedLaplace(model, likelihood).fit(loader)


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("stage", [fit, train])
def test_a_bad_row_is_named_with_its_batch(name, stage):
    x, y, likelihood = BAD[name]
    with pytest.raises(DataError, match=r"row 3.*batch 2"):
        stage(mlp(), likelihood, batches(x, y))


@pytest.mark.parametrize("name", [name for name, row in BAD.items() if row[2] != "regression"])
def test_a_bad_row_of_validation_data_is_named_with_its_batch(name):
    x, y, likelihood = BAD[name]
    good = y.clone().index_copy(0, torch.tensor([15]), y[:1])
    scaling = TemperatureScaling(mlp(), likelihood, validation=batches(x, y))
    with pytest.raises(DataError, match=r"row 3.*batch 2"):
        scaling.fit(batches(X, good))


@pytest.mark.parametrize(
    ("last", "received"),
    [
        ((torch.zeros(2, 5).double(), torch.zeros(2).long()), r"\(2, 5\)"),
        ((torch.zeros(2, 4), torch.zeros(2).long()), "float32"),
        ((torch.zeros(2, 4).double(), torch.zeros(2)), "float32"),
        ((torch.zeros(2, 4).double(), torch.zeros(2, 1).long()), r"\(2, 1\)"),
        ((torch.zeros(2, 4).double(), torch.zeros(3).long()), r"\(3,\)|3 targets"),
        ((torch.zeros(2, 4).double(), [0, 1]), "list"),
        (torch.zeros(2, 4).double(), "Tensor"),
    ],
    ids=["features", "dtype of x", "dtype of y", "shape of y", "length of y", "a list", "no targets"],
)
@pytest.mark.parametrize("stage", [fit, train])
def test_a_batch_that_is_not_like_the_first_is_named(last, received, stage):
    with pytest.raises(DataError, match=rf"({received}).*batch 4"):
        stage(mlp(), "classification", [*batches(X, torch.arange(20) % C), last])


def test_masked_logits_of_minus_infinity_say_what_to_do_and_the_remedy_gives_the_variance_of_the_rest():
    class Masked(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.inner, self.value = mlp(), value

        def forward(self, x):
            return self.inner(x).masked_fill(x[:, :1] > torch.tensor([9.0, 9.0, 0.5]), self.value)

    y = torch.arange(20) % 2
    with pytest.raises(DataError, match=r"-Inf in row \d.*masked_fill\(mask, -1e4\)"):
        LinearizedLaplace(Masked(-inf).eval(), "classification").fit(batches(X, y))
    model = Masked(-1e4).eval()
    found = LinearizedLaplace(model, "classification", prior_precision=DELTA).fit(batches(X, y))
    assert torch.isfinite(found.variance(X)).all()
    masked = X[:, 0] > 0.5
    assert found.variance(X)[masked, 2].abs().max() == 0


class Reusing:
    """A loader that fills the same two tensors for every batch."""

    def __init__(self, x, y):
        self.pairs = batches(x, y, 5)
        self.x, self.y = torch.empty_like(self.pairs[0][0]), torch.empty_like(self.pairs[0][1])

    def __iter__(self):
        for x, y in self.pairs:
            self.x.copy_(x)
            self.y.copy_(y)
            yield self.x, self.y


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("estimator", ["cholesky", "pointwise", "refit"])
def test_a_loader_that_reuses_its_tensors_gives_the_same_fit(estimator, kept, monkeypatch):
    if not kept:
        monkeypatch.setattr("estimators.data.training_data._CACHE_BYTES", 100)
    model, y = mlp(), torch.arange(20) % C
    make = ESTIMATORS[estimator]
    expected = make(model, "classification", prior_precision=DELTA).fit(batches(X, y, 5)).variance(X[:3])
    found = make(model, "classification", prior_precision=DELTA).fit(Reusing(X, y)).variance(X[:3])
    assert torch.allclose(found, expected, rtol=1e-9)


def test_data_that_are_changed_after_a_fit_do_not_change_it():
    model, x, y = mlp(), X.clone(), torch.arange(20) % C
    fitted = RegVar(model, "classification", regularizer=Pointwise(), solver=EXACT).fit(batches(x, y))
    before = fitted.variance(X[:3])
    x.zero_()
    assert torch.equal(fitted.variance(X[:3]), before)
