"""Metrics of saturated predictions: from the logits of a float32 network, against exact arithmetic on the float64 one.

The reference has 500 decimal digits, so that a probability of exp(−1000) is a number like any other, and derives each
metric a second time from its definition.
"""

import copy
from itertools import pairwise

import mpmath
import numpy as np
import pytest
import torch
from mpmath import mpf
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from torch import nn

from bdl_bench.metrics import evaluate
from bdl_bench.metrics.log_space import log_entropy, log_odds_of_top, log_softmax, logs
from bdl_bench.metrics.per_example import top_labels
from bdl_bench.problem import Problem
from bdl_bench.records.predictions import Predictor
from estimators.baselines.map import MAP
from estimators.calibration.scores import negative_log_predictive
from estimators.likelihoods import Bernoulli, Categorical
from estimators.likelihoods.prediction import Prediction

GAPS = [50, 200, 1000]  # exp of minus a gap: a number in float32, in float64 only, in neither
ROWS, CLASSES, INPUTS = 40, 4, 6


@pytest.fixture(autouse=True)
def exact():
    with mpmath.workdps(500):
        yield


def rows_of(gap, seed, n=ROWS):
    """Inputs whose logits differ by about `gap` nats, some of them by none."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, INPUTS, generator=generator, dtype=torch.float64).float()
    size = torch.rand(n, 1, generator=generator).square()  # many rows with small gaps, some with the largest
    return x * size * gap / 2


def network(kind):
    torch.manual_seed(0)
    outputs = CLASSES if kind == "classification" else 2
    return nn.Linear(INPUTS, outputs, bias=False).eval()


def labels_of(model, x, kind, seed):
    """The labels of the network itself, but for a quarter of the rows."""
    f = model(x)
    generator = torch.Generator().manual_seed(seed)
    other = torch.rand(len(x), generator=generator) < 0.25
    if kind == "classification":
        random = torch.randint(CLASSES, (len(x),), generator=generator)
        return torch.where(other, random, f.argmax(-1))
    return ((f > 0) ^ other[:, None]).float()


def problem_of(kind, gap):
    model = network(kind)

    def batches(seed):
        x = rows_of(gap, seed)
        y = labels_of(model, x, kind, seed)
        return list(zip(x.split(7), y.split(7), strict=True))

    train, validation, test, shifted = map(batches, (1, 2, 3, 4))
    far = [rows_of(gap, 5, n=15)]
    sets = {"ood": {"far": far}, "shifts": {"noise-1": shifted}}
    return Problem(model, kind, train, validation, test, prior_precision=0.7, **sets)


def arrays_of(problem):
    estimator = MAP(problem.model, problem.likelihood, prior_precision=0.7).fit(problem.train)
    return Predictor(problem, estimator, estimator.predict).all_sets()


class Exact:
    """Examples of classes with exact probabilities, from the float64 logits of a loader."""

    def __init__(self, model, loader, kind):
        double = copy.deepcopy(model).double()
        batches = [(item if isinstance(item, (tuple, list)) else (item, None)) for item in loader]
        f = torch.cat([double(x.double()) for x, _ in batches]).detach().numpy()
        targets = None if batches[0][1] is None else torch.cat([y for _, y in batches]).numpy()
        self.rows = len(f)
        if kind == "binary":  # each output an example of two classes
            f = np.stack([np.zeros(f.size), f.reshape(-1)], axis=-1)
        self.logits = f
        self.targets = None if targets is None else targets.reshape(-1).astype(int)
        weights = [[mpmath.exp(mpf(float(v))) for v in row] for row in f]
        self.p = [[w / sum(row) for w in row] for row in weights]
        self.doubt = [1 - max(row) for row in self.p]

    @property
    def right(self):
        return np.array([max(range(len(p)), key=p.__getitem__) == y for p, y in zip(self.p, self.targets, strict=True)])

    def nll(self):
        return float(sum(-mpmath.log(p[y]) for p, y in zip(self.p, self.targets, strict=True)) / len(self.p))

    def brier(self):
        terms = [sum((q - (c == y)) ** 2 for c, q in enumerate(p)) for p, y in zip(self.p, self.targets, strict=True)]
        return float(sum(terms) / len(terms))

    def order(self):
        """Rows, most confident first."""
        return sorted(range(len(self.doubt)), key=self.doubt.__getitem__)

    def calibration_gaps(self, groups):
        confidence = np.array([float(max(p)) for p in self.p])
        for rows in groups:
            if len(rows):
                yield len(rows), confidence[rows].mean() - self.right[rows].mean(), self.right[rows].mean()

    def ece(self):
        confidence = np.array([float(max(p)) for p in self.p])
        edges = np.arange(16) / 15
        groups = [
            np.flatnonzero((confidence > low) & (confidence <= high) | (low == 0) & (confidence == 0))
            for low, high in pairwise(edges)
        ]
        return sum(n * abs(gap) for n, gap, _ in self.calibration_gaps(groups)) / len(self.p)

    def adaptive_ece(self):
        groups = np.array_split(self.order()[::-1], 15)
        return sum(n * abs(gap) for n, gap, _ in self.calibration_gaps(groups)) / len(self.p)

    def debiased_ece(self):
        groups = np.array_split(self.order()[::-1], 15)
        terms = [n * (gap**2 - a * (1 - a) / (n - 1)) for n, gap, a in self.calibration_gaps(groups) if n > 1]
        return np.sqrt(max(0.0, sum(terms) / len(self.p)))

    def aurc(self):
        losses = 1.0 - self.right[self.order()]
        return np.mean([losses[: k + 1].mean() for k in range(len(losses))])

    def augrc(self):
        losses = 1.0 - self.right[self.order()]
        points = np.concatenate([[0.0], np.cumsum(losses) / len(losses)])
        return np.mean((points[1:] + points[:-1]) / 2)

    def entropies(self):
        """Of each row, summed over its outputs."""
        per_example = [-sum(q * mpmath.log(q) for q in p) for p in self.p]
        outputs = len(self.p) // self.rows
        return [sum(per_example[outputs * i : outputs * (i + 1)]) for i in range(self.rows)]


def auroc(inside, outside):
    pairs = [(o > i) + 0.5 * (o == i) for i in inside for o in outside]
    return float(np.mean(pairs))


def nll_at(examples, temperature):
    scaled = examples.logits / temperature
    return float((logsumexp(scaled, axis=-1) - scaled[np.arange(len(scaled)), examples.targets]).mean())


def near(value):
    return pytest.approx(value, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("kind", ["classification", "binary"])
def test_every_metric_of_a_float32_network_is_that_of_exact_arithmetic(kind, gap):
    problem = problem_of(kind, gap)
    values = evaluate(kind, arrays_of(problem))
    test, validation, far, shifted = (
        Exact(problem.model, loader, kind)
        for loader in (problem.test, problem.validation, problem.ood["far"], problem.shifts["noise-1"])
    )
    assert all(np.isfinite(value) for value in values.values())
    expected = {
        "cls/NLL": test.nll(), "cls/Brier": test.brier(), "cls/Acc": test.right.mean(),
        "cal/ECE": test.ece(), "cal/aECE": test.adaptive_ece(), "cal/dECE": test.debiased_ece(),
        "sc/AURC": test.aurc(), "sc/AUGRC": test.augrc(),
        "ood/AUROC/far/entropy": auroc(test.entropies(), far.entropies()),
        "shift/NLL/noise-1": shifted.nll(), "shift/ECE/noise-1": shifted.ece(),
    }  # fmt: skip
    assert {key: values[key] for key in expected} == {key: near(value) for key, value in expected.items()}
    chosen = minimize_scalar(
        lambda t: nll_at(validation, np.exp(t)), bounds=(np.log(0.01), np.log(100)), method="bounded",
        options={"xatol": 1e-10},
    )  # fmt: skip
    assert values["cls/NLL*"] == pytest.approx(nll_at(test, np.exp(chosen.x)), rel=1e-4)


def test_float32_probabilities_would_not_do():
    """The same arrays without log-probabilities, as probabilities in float32: the NLL is infinite and rows tie."""
    arrays = {name: a for name, a in arrays_of(problem_of("classification", 1000)).items() if not name.endswith("logs")}
    rounded = {name: a.astype(np.float32).astype(float) for name, a in arrays.items() if not name.endswith("log_probs")}
    assert evaluate("classification", rounded)["cls/NLL"] == np.inf
    assert len(set(rounded["probs"].max(-1))) < len(set(top_labels(arrays).log_odds)) == ROWS


@pytest.mark.parametrize("link", ["probit", "mc"])
@pytest.mark.parametrize("kind", ["classification", "binary"])
def test_the_links_average_in_log_space(kind, link):
    generator = torch.Generator().manual_seed(3)
    outputs, n_samples = 3, 5
    samples = 300 * torch.randn(n_samples, 8, outputs, generator=generator)
    mean, variance = samples.mean(0), samples.var(0)
    likelihood = Categorical() if kind == "classification" else Bernoulli()
    made = likelihood.predict(mean, variance, samples if link == "mc" else None)
    wide_mean, wide_variance = mean.double(), variance.double()
    logits = samples.double() if link == "mc" else (wide_mean / (1 + np.pi / 8 * wide_variance).sqrt())[None]
    for row in range(8):
        if kind == "classification":
            weights = [[mpmath.exp(mpf(float(v))) for v in f[row]] for f in logits]
            p = [sum(w[c] / sum(w) for w in weights) / len(weights) for c in range(outputs)]
            expected = [float(mpmath.log(q)) for q in p]
            assert made.log_probs[row].tolist() == pytest.approx(expected, rel=1e-12)
            entropy = float(-sum(q * mpmath.log(q) for q in p))
            assert float(made.entropy[row]) == pytest.approx(entropy, rel=1e-6, abs=1e-40)
        else:
            p = [
                sum(1 / (1 + mpmath.exp(-mpf(float(f[row, c])))) for f in logits) / len(logits) for c in range(outputs)
            ]
            expected = [float(mpmath.log(q / (1 - q))) for q in p]
            assert made.log_odds[row].tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["classification", "binary"])
def test_the_score_of_tuning_is_finite_where_probabilities_are_zero(kind):
    mean, variance = torch.tensor([[900.0, 0.0, -900.0]]), torch.zeros(1, 3)
    if kind == "classification":
        scores = negative_log_predictive(Categorical().predict(mean, variance, None), torch.tensor([2]), Categorical())
        assert scores.tolist() == [1800.0]
        halved = Categorical().predict(mean, variance, None).calibrated(softmax_temperature=2.0)
        assert negative_log_predictive(halved, torch.tensor([2]), Categorical()).tolist() == [900.0]
    else:
        scores = negative_log_predictive(Bernoulli().predict(mean, variance, None), torch.tensor([[0.0, 1.0, 1.0]]))
        assert scores.tolist() == pytest.approx([900.0, np.log(2), 900.0], rel=1e-15)


def test_soft_targets_weigh_the_log_probabilities():
    mean, variance = torch.tensor([[900.0, 0.0]]), torch.zeros(1, 2)
    classes = Categorical().predict(mean, variance, None)
    assert negative_log_predictive(classes, torch.tensor([[0.25, 0.75]])).tolist() == [675.0]
    outputs = Bernoulli().predict(mean, variance, None)
    scores = negative_log_predictive(outputs, torch.tensor([[0.25, 0.5]]))
    assert scores.tolist() == pytest.approx([675.0, np.log(2)], rel=1e-15)
    certain = Prediction(mean, variance, "classification", probs=torch.tensor([[1.0, 0.0]]))
    assert negative_log_predictive(certain, torch.tensor([[1.0, 0.0]])).tolist() == [0.0]


def test_a_prediction_with_probabilities_alone_is_scored_by_them():
    probs = torch.tensor([[0.7, 0.2, 0.1]])
    alone = Prediction(torch.zeros(1, 3), torch.zeros(1, 3), "classification", probs=probs)
    assert negative_log_predictive(alone, torch.tensor([1])).tolist() == pytest.approx([-np.log(0.2)], rel=1e-6)
    single = Prediction(torch.zeros(1, 3), torch.zeros(1, 3), "binary", probs=probs)
    expected = [-np.log(0.7), -np.log(0.8), -np.log(0.1)]
    assert negative_log_predictive(single, torch.tensor([[1.0, 0.0, 1.0]])).tolist() == pytest.approx(
        expected, rel=1e-6
    )


def test_the_order_of_entropies_and_confidences_is_exact_down_to_a_thousand_nats():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 4)) * np.geomspace(0.01, 1000, 200)[:, None]
    found = log_softmax(logits)
    for row in range(0, 200, 7):
        weights = [mpmath.exp(mpf(float(v))) for v in logits[row]]
        p = [w / sum(weights) for w in weights]
        entropy = -sum(q * mpmath.log(q) for q in p)
        assert log_entropy(found[row]) == pytest.approx(float(mpmath.log(entropy)), rel=1e-12, abs=1e-13)
        odds = mpmath.log(max(p) / (1 - max(p)))
        assert log_odds_of_top(found[row]) == pytest.approx(float(odds), rel=1e-9, abs=1e-12)
        assert found[row].tolist() == pytest.approx([float(mpmath.log(q)) for q in p], rel=1e-12)


def test_rows_of_equal_top_probability_still_tie():
    probs = np.array([[0.6, 0.3, 0.1], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6], [0.55, 0.25, 0.2]])
    odds = log_odds_of_top(logs(probs))
    assert len(set(odds)) == 2
    assert odds.tolist() == pytest.approx([np.log(1.5)] * 3 + [np.log(0.55 / 0.45)], rel=1e-12)


def test_a_certain_row_has_no_entropy_and_no_doubt():
    certain = logs(np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]))
    assert log_entropy(certain).tolist() == pytest.approx([-np.inf, np.log(np.log(2))])
    assert log_odds_of_top(certain).tolist() == pytest.approx([np.inf, 0.0], abs=1e-12)
