"""Joint NLL, mutual information and energy score against densities of all labels written out, and their limits."""

import warnings

import numpy as np
import pytest
import scoringrules
import torch
from scipy.special import log_softmax
from scipy.stats import binom, entropy, multivariate_normal, norm
from torch import nn

from bdl_bench.metrics import evaluate, regression
from bdl_bench.metrics.joint import TAU, anchor_counts, joint_nll_of_gaussian, joint_nll_of_samples
from bdl_bench.metrics.mutual_information import mutual_information
from bdl_bench.problem import Problem
from bdl_bench.problem.queries import Query
from bdl_bench.records.predictions import Predictor
from bdl_bench.records.sample_scores import SampleScores
from estimators import LastLayerLaplace, LinearizedLaplace, LinearResponse, MeanAbsolute, RegVar, tune
from estimators.baselines.ensemble import DeepEnsemble
from estimators.baselines.map import MAP
from estimators.errors import TuningBoundaryWarning


def near(value, rel=1e-9):
    return pytest.approx(value, rel=rel, abs=1e-12)


def test_the_counts_are_binomial_and_sum_to_tau():
    counts = anchor_counts(4000, np.random.default_rng(0))
    assert (counts.sum(-1) == TAU).all()
    shares = np.bincount(counts[:, 0], minlength=TAU + 1) / 4000
    assert shares == pytest.approx(binom.pmf(range(TAU + 1), TAU, 0.5), abs=0.02)


def test_samples_give_the_average_of_the_products_of_likelihoods():
    # Two samples, one set: p(y_a) = .5 or .1 three times, p(y_b) = .2 or .4 once.
    log_likelihood = np.log(np.array([[[0.5, 0.2]], [[0.1, 0.4]]]))
    expected = -np.log(0.5 * (0.5**3 * 0.2 + 0.1**3 * 0.4)) / 4
    assert joint_nll_of_samples(log_likelihood, np.array([[3, 1]])) == near([expected])


def test_an_anchor_that_is_absent_does_not_count_even_at_probability_zero():
    log_likelihood = np.array([[[np.log(0.5), -np.inf]]])
    assert joint_nll_of_samples(log_likelihood, np.array([[4, 0]])) == near([np.log(2)])
    assert joint_nll_of_samples(log_likelihood, np.array([[3, 1]]))[0] == np.inf


def test_one_sample_has_the_mean_of_the_marginal_scores():
    log_likelihood = np.log(np.random.default_rng(0).uniform(size=(1, 5, 2)))
    counts = anchor_counts(5, np.random.default_rng(1))
    assert joint_nll_of_samples(log_likelihood, counts) == near(-(log_likelihood[0] * counts).sum(-1) / TAU)


@pytest.mark.parametrize("counts", [(4, 3), (7, 0), (0, 1)])
def test_the_gaussian_formula_equals_the_density_of_all_labels(counts):
    rng = np.random.default_rng(2)
    root = rng.normal(size=(4, 4))
    covariance, noise = root @ root.T, rng.uniform(0.2, 2, size=4)
    mean, targets = rng.normal(size=4), rng.normal(size=4)
    rows = np.repeat([0, 1], counts)
    index = np.concatenate([[2 * row, 2 * row + 1] for row in rows])
    full = covariance[np.ix_(index, index)] + np.diag(noise[index])
    expected = -multivariate_normal.logpdf(targets[index], mean[index], full) / len(rows)
    shaped = (array.reshape(1, 2, 2) for array in (mean, noise, targets))
    m, n, y = shaped
    found = joint_nll_of_gaussian(m, covariance.reshape(1, 2, 2, 2, 2), n, y, np.array([counts]))
    assert found == near([expected])


def test_mutual_information_matches_its_definition_and_its_limits():
    rng = np.random.default_rng(3)
    logs = log_softmax(2 * rng.normal(size=(6, 4, 3)), axis=-1)
    probs = np.exp(logs)
    assert mutual_information(logs) == near(entropy(probs.mean(0), axis=-1) - entropy(probs, axis=-1).mean(0))
    assert (mutual_information(np.repeat(logs[:1], 7, axis=0)) == 0).all()
    with np.errstate(divide="ignore"):
        certain = np.log(np.eye(3))[:, None]  # three samples, each certain of another class
    assert mutual_information(certain) == near([np.log(3)])


def test_the_energy_score_of_one_output_estimates_the_crps():
    rng = np.random.default_rng(4)
    samples, targets = 0.3 + 0.8 * rng.normal(size=(4000, 2, 1)), np.array([[1.1], [-0.2]])
    exact = regression.crps(np.full((2, 1), 0.3), np.full((2, 1), 0.64), targets)
    assert regression.energy_score(samples, targets) == pytest.approx(exact, abs=0.02)


def test_the_energy_score_matches_its_sums_over_pairs():
    rng = np.random.default_rng(5)
    samples, targets = rng.normal(size=(5, 3, 2)), rng.normal(size=(3, 2))
    distance = np.linalg.norm(samples - targets, axis=-1).mean(0)
    pairs = np.linalg.norm(samples[:, None] - samples[None], axis=-1).sum((0, 1)) / (5 * 4)
    assert regression.energy_score(samples, targets) == near(distance - pairs / 2)


def test_the_interval_score_matches_its_definition_and_is_least_for_the_true_quantiles():
    mean, variance = np.zeros((3, 1)), np.full((3, 1), 4.0)
    half = 2 * norm.ppf(0.975)
    targets = np.array([[0.0], [half + 1], [-half - 0.5]])
    found = regression.interval_score(mean, variance, targets, level=0.95)
    assert found.shape == (3,)
    assert found == near([2 * half, 2 * half + 40 * 1, 2 * half + 40 * 0.5])
    assert found == near(scoringrules.interval_score(targets, mean - half, mean + half, 0.05))
    drawn = np.random.default_rng(6).normal(size=(20000, 1))
    scores = {v: regression.interval_score(0 * drawn, v + 0 * drawn, drawn, level=0.9).mean() for v in (0.5, 1.0, 2.0)}
    assert min(scores, key=scores.get) == 1.0


GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(11, 3, generator=GENERATOR, dtype=torch.float64)
LABELS = {
    "regression": torch.randn(11, 2, generator=GENERATOR, dtype=torch.float64),
    "classification": torch.randint(2, (11,), generator=GENERATOR),
    "binary": torch.randint(2, (11, 2), generator=GENERATOR).double(),
}


def made_problem(kind, order=slice(None)):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().eval()
    train = list(zip(X.split((4, 4, 3)), LABELS[kind].split((4, 4, 3)), strict=True))
    test = [(X[order], LABELS[kind][order])]
    return Problem(model, kind, train, train, test, prior_precision=0.3, ood={"far": [5 * X[:6]]})


def scores(problem, estimator, rows=slice(None)):
    kind = problem.likelihood.kind
    return SampleScores(estimator, estimator.predict_uncalibrated).of_batch(
        Query(X[rows], LABELS[kind][rows]), joint=True
    )


def fitted(cls, problem, **options):
    return cls(problem.model, problem.likelihood, prior_precision=0.3, **options).fit(problem.train)


@pytest.mark.parametrize("kind", LABELS)
def test_without_variance_the_joint_nll_is_the_nll_of_the_repeated_labels(kind):
    problem = made_problem(kind)
    estimator = fitted(MAP, problem)
    found = scores(problem, estimator)
    nll = problem.likelihood.nll(problem.model(X), LABELS[kind]).detach().numpy()
    rng = np.random.default_rng(0)
    order = rng.permutation(11)
    counts = anchor_counts(11, rng)
    expected = np.empty(11)
    expected[order] = (counts * np.stack([nll[order], nll[np.roll(order, -1)]], -1)).sum(-1) / TAU
    assert found["joint_nll"] == near(expected)
    assert not found.get("mutual_information", np.zeros(1)).any()
    assert set(found) == {"joint_nll", "energy_score" if kind == "regression" else "mutual_information"}


def test_laplace_regression_has_the_joint_density_of_its_own_covariance():
    problem = made_problem("regression")
    estimator = fitted(LinearizedLaplace, problem)
    found = scores(problem, estimator, slice(2))["joint_nll"]
    rng = np.random.default_rng(0)
    order = rng.permutation(2)
    counts = anchor_counts(2, rng)
    covariance = estimator.joint_covariance(X[:2]).numpy().reshape(4, 4)
    mean, targets = (t.detach().numpy().reshape(-1) for t in (problem.model(X[:2]), LABELS["regression"][:2]))
    for k, row in enumerate(order):
        rows = np.repeat([row, order[1 - k]], counts[k])
        index = np.concatenate([[2 * r, 2 * r + 1] for r in rows])
        full = covariance[np.ix_(index, index)] + np.eye(2 * TAU)
        expected = -multivariate_normal.logpdf(targets[index], mean[index], full) / TAU
        assert found[row] == near(expected)


@pytest.mark.parametrize("kind", ["classification", "binary"])
def test_members_and_gaussian_samples_agree_with_sums_over_samples(kind):
    problem = made_problem(kind)
    others = []
    for seed in (2, 3):
        torch.manual_seed(seed)
        others.append(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().eval())
    ensemble = fitted(DeepEnsemble, problem, members=others)
    found = scores(problem, ensemble)
    nll = torch.stack([problem.likelihood.nll(m(X), LABELS[kind]) for m in (problem.model, *others)]).detach().numpy()
    rng = np.random.default_rng(0)
    order = rng.permutation(11)
    counts = anchor_counts(11, rng)
    for k, row in enumerate(order):
        joint = np.exp(-counts[k, 0] * nll[:, row] - counts[k, 1] * nll[:, order[(k + 1) % 11]]).mean()
        assert found["joint_nll"][row] == near(-np.log(joint) / TAU)
    outputs = torch.stack([m(X) for m in (problem.model, *others)]).detach()
    probs = (
        outputs.softmax(-1) if kind == "classification" else torch.stack([1 - outputs.sigmoid(), outputs.sigmoid()], -1)
    )
    probs = probs.numpy()
    assert found["mutual_information"] == near(entropy(probs.mean(0), axis=-1) - entropy(probs, axis=-1).mean(0), 1e-6)


def test_gaussian_samples_have_the_mutual_information_of_the_laplace_posterior():
    problem = made_problem("classification")
    estimator = fitted(LinearizedLaplace, problem)
    samples = estimator.sample(X, 20_000)
    expected = mutual_information(log_softmax(samples.numpy(), axis=-1))
    found = scores(problem, estimator)
    assert found["mutual_information"] == pytest.approx(expected, rel=0.25, abs=0.01)
    # A likelihood averaged over the posterior of both rows, in place of τ · NLL.
    logs = log_softmax(samples.numpy(), axis=-1)
    likelihood = np.take_along_axis(logs, LABELS["classification"].numpy()[None, :, None], -1)[..., 0]
    rng = np.random.default_rng(0)
    order = rng.permutation(11)
    counts = anchor_counts(11, rng)
    pairs = np.stack([order, np.roll(order, -1)], -1)
    assert found["joint_nll"][order] == pytest.approx(joint_nll_of_samples(likelihood[:, pairs], counts), abs=0.06)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_the_tuned_scores_use_the_calibration(kind):
    problem = made_problem(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TuningBoundaryWarning)
        tuned = tune(fitted(LinearizedLaplace, problem), problem.validation, option=None)
    query = Query(X, LABELS[kind])
    untuned = scores(problem, tuned.estimator)["joint_nll"]
    assert tuned.calibration.noise_or_temperature != 1
    found = SampleScores(tuned.estimator, tuned.predict_standardized, tuned.calibration).of_batch(query, joint=True)
    found = found["joint_nll"]
    assert not np.allclose(found, untuned)
    if kind == "regression":
        rng = np.random.default_rng(0)
        order = rng.permutation(11)
        counts = anchor_counts(11, rng)
        rows = np.stack([order, np.roll(order, -1)], -1)
        covariance = tuned.estimator.joint_covariance(X).numpy() * tuned.calibration.variance_scale
        pairs = np.stack([covariance[np.ix_(r, range(2), r, range(2))] for r in rows])
        mean, y = problem.model(X).detach().numpy()[rows], LABELS[kind].numpy()[rows]
        noise = np.full_like(mean, tuned.calibration.sigma_noise**2)
        assert found[order] == near(joint_nll_of_gaussian(mean, pairs, noise, y, counts))


def test_a_method_without_samples_has_no_joint_scores():
    problem = made_problem("classification")
    estimator = fitted(RegVar, problem, regularizer=MeanAbsolute(), solver=LinearResponse())
    assert scores(problem, estimator) == {}
    arrays = Predictor(problem, estimator, estimator.predict_uncalibrated).all_sets()
    assert not any("jNLL" in key or "mutual" in key for key in evaluate("classification", arrays))


def test_one_row_is_paired_with_itself():
    problem = made_problem("regression")
    estimator = fitted(LastLayerLaplace, problem)
    found = scores(problem, estimator, slice(10, 11))["joint_nll"]
    covariance = estimator.covariance(X[10:]).numpy()[0]
    full = np.kron(np.ones((TAU, TAU)), covariance) + np.eye(2 * TAU)
    mean, y = problem.model(X[10:]).detach().numpy()[0], LABELS["regression"][10].numpy()
    assert found == near([-multivariate_normal.logpdf(np.tile(y, TAU), np.tile(mean, TAU), full) / TAU])


def test_a_record_has_the_same_scores_in_any_order_of_its_rows():
    order = torch.randperm(11, generator=torch.Generator().manual_seed(2))
    found = []
    for problem in (made_problem("classification"), made_problem("classification", order)):
        estimator = fitted(LinearizedLaplace, problem)
        found.append(Predictor(problem, estimator, estimator.predict_uncalibrated).all_sets())
    for name in ("joint_nll", "mutual_information"):
        assert found[1][name] == near(found[0][name][order.numpy()])


def test_the_metrics_of_a_record_are_the_means_of_its_scores():
    problem = made_problem("classification")
    estimator = fitted(LinearizedLaplace, problem)
    arrays = Predictor(problem, estimator, estimator.predict_uncalibrated).all_sets()
    found = evaluate("classification", arrays)
    assert found["cls/jNLL"] == near(arrays["joint_nll"].mean())
    inside, outside = arrays["mutual_information"], arrays["ood/far/mutual_information"]
    pairs = (outside[:, None] > inside).mean() + (outside[:, None] == inside).mean() / 2
    assert found["ood/AUROC/far/mutual_information"] == near(pairs)
    assert {"sc/AURC/mutual_information", "sc/AUGRC/mutual_information"} <= found.keys()
