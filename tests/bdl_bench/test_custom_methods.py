"""A plain class with `fit` and `variance` is a method; what it does not report is recorded as not reported."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from bdl_bench import Problem, compare
from bdl_bench.methods import METHODS, Method
from bdl_bench.methods.custom_methods import as_estimator
from bdl_bench.records import RecordStore
from estimators import LastLayerLaplace
from estimators.errors import DataError, OptionError, UnsupportedError
from estimators.likelihoods import Categorical

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(24, 3, generator=GENERATOR, dtype=torch.float64)
Y = torch.randint(3, (24,), generator=GENERATOR)
BATCHES = list(zip(X.split(7), Y.split(7), strict=True))


def make_problem(seed):
    """Three classes."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double().eval()
    return Problem(
        model, "classification", BATCHES, BATCHES, BATCHES[:3], prior_precision=0.5, ood={"far": [9 * X[:5]]}
    )


class Distance:
    """Squared distance to the mean training row, for each output."""

    def __init__(self, model):
        self.model = model

    def fit(self, train_loader):
        self.centre_ = torch.cat([x for x, _ in train_loader]).mean(0)
        self.n_seen_ = sum(len(x) for x, _ in train_loader)

    def variance(self, x):
        return (x - self.centre_).square().sum(-1, keepdim=True).expand(-1, 3)


class Slotted:
    """No __dict__, a new object from fit, an array from variance."""

    __slots__ = ("scale",)

    def __init__(self, model):  # noqa: ARG002
        self.scale = 1.0

    def fit(self, train_loader):  # noqa: ARG002
        made = Slotted(None)
        made.scale = 4.0
        return made

    def variance(self, x):
        return np.full((len(x), 3), self.scale, dtype=np.float32)


def broken(value):
    class Broken(Distance):
        def variance(self, x):
            return value(super().variance(x))

    return Broken


@pytest.fixture
def run(tmp_path, monkeypatch):
    def run(kind, tune=1):
        monkeypatch.setitem(METHODS, "own", Method("own", "a plain class", lambda problem, seed: kind(problem.model)))  # noqa: ARG005
        (record,) = compare(make_problem, ["own"], seeds=1, tune_budget=tune, out=tmp_path, progress_bar=False).records
        return record, RecordStore(tmp_path).arrays(record)

    return run


@pytest.mark.parametrize("tune", [0, 1, 3])
def test_a_plain_class_is_fitted_tuned_scored_and_reported(run, tune, tmp_path):
    record, arrays = run(Distance, tune)
    assert record.status == "ok", record.traceback
    x = torch.cat([x for x, _ in BATCHES[:3]])
    expected = (x - X.mean(0)).square().sum(-1, keepdim=True).expand(-1, 3)
    assert arrays["epistemic_variance"] == pytest.approx(expected.numpy(), rel=1e-12)
    model = make_problem(0).model
    by_hand = Categorical().predict(model(x), expected, None).probs.detach().numpy()
    assert arrays["probs"] == pytest.approx(by_hand, rel=1e-12)
    assert record.cost.passes is None
    assert record.fit_report["passes"] == "not reported"
    assert record.fit_report["n_seen_"] == "24"
    assert "ood/AUROC/far/variance" in record.metrics
    assert "not reported" in (tmp_path / "report.html").read_text()


def test_fit_may_return_another_object_and_variance_an_array(run):
    record, arrays = run(Slotted)
    assert record.status == "ok", record.traceback
    assert (arrays["epistemic_variance"] == 4).all()


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (lambda v: torch.where(v > v.median(), torch.nan, v), "finite variance from Broken.variance"),
        (lambda v: v * torch.inf, "NaN or Inf"),
        (lambda v: -v, "variance >= 0"),
        (lambda v: v[:, :2], r"shape \(7, 3\)"),
        (lambda v: v[:, 0], r"shape \(7,\)"),
        (lambda v: v[:1], r"shape \(1, 3\)"),
        (lambda _: "high", "a str"),
        (lambda _: None, "NoneType"),
    ],
    ids=["nan", "inf", "negative", "fewer outputs", "no outputs", "one row", "text", "nothing"],
)
def test_a_variance_that_is_none_fails_and_is_no_number(run, value, told):
    record, _ = run(broken(value))
    assert record.status == "failed"
    assert record.reason.startswith("DataError")
    assert re.search(told, record.reason)
    assert not record.metrics


class Predicting(Distance):
    """With a prediction of its own, and passes."""

    passes_ = 3.5

    def predict(self, x):
        return Categorical().predict(self.model(x).detach() / 2, self.variance(x), None)


def test_its_own_prediction_and_passes_are_taken(run):
    record, arrays = run(Predicting, 0)
    x = torch.cat([x for x, _ in BATCHES[:3]])
    assert arrays["mean"] == pytest.approx(make_problem(0).model(x).detach().numpy() / 2, rel=1e-12)
    assert record.cost.passes == 3.5
    assert "passes" not in record.fit_report


class Scoring:
    """A score of each row, and no variance."""

    def __init__(self, model): ...

    def fit(self, train_loader):
        self.centre_ = torch.cat([x for x, _ in train_loader]).mean(0)

    def score(self, x):
        return (x - self.centre_).square().sum(-1).numpy()


@pytest.mark.parametrize("kind", [Scoring, "ddu"])
def test_a_method_with_a_score_and_no_variance_detects_by_its_score(run, kind, tmp_path):
    make = METHODS["ddu"].build if kind == "ddu" else None
    record, arrays = run(kind if make is None else lambda model: make(make_problem(0), 0), 2)  # noqa: ARG005
    assert record.status == "ok", record.traceback
    x = torch.cat([x for x, _ in BATCHES[:3]])
    if kind is Scoring:
        assert arrays["score"] == pytest.approx((x - X.mean(0)).square().sum(-1).numpy(), rel=1e-12)
    assert arrays["ood/far/score"].shape == (5,)
    by_hand = (arrays["ood/far/score"][:, None] > arrays["score"]).mean()
    assert record.metrics["ood/AUROC/far/score"] == pytest.approx(by_hand)
    assert record.tuned["ood/AUROC/far/score"] == pytest.approx(by_hand)  # calibration changes no score
    assert "ood/AUROC/far/variance" not in record.metrics
    assert "sc/AURC/variance" not in record.metrics
    page = (tmp_path / "report.html").read_text()
    assert "AUROC" in page
    assert "own score" in page


def test_the_score_of_scikit_learn_is_no_score_of_rows():
    class Classifier(Distance):
        def score(self, x, y):  # noqa: ARG002
            return 1.0

    problem = make_problem(0)
    fitted = as_estimator(Classifier(problem.model), problem).fit(problem.train)
    with pytest.raises(UnsupportedError, match="score"):
        fitted.score(X)


class Scikit(Distance):
    """Predict as scikit-learn has it."""

    def predict(self, x):
        return self.model(x).argmax(-1)


class Tuning(Distance):
    """Changes the network."""

    def fit(self, train_loader):
        super().fit(train_loader)
        with torch.no_grad():
            self.model[0].weight.mul_(2)


def test_another_kind_of_prediction_and_a_changed_network_are_failures_with_a_remedy(run):
    record, _ = run(Scikit)
    assert record.status == "failed"
    assert "Prediction from Scikit.predict" in record.reason
    record, _ = run(Tuning)
    assert record.status == "failed"
    assert "ModelChangedError" in record.reason


def test_what_cannot_be_fitted_is_no_method():
    problem = make_problem(0)
    with pytest.raises(OptionError, match="a object without fit and variance"):
        as_estimator(object(), problem)
    estimator = LastLayerLaplace(problem.model, "classification")
    assert as_estimator(estimator, problem) is estimator


def test_one_output_may_be_a_number_a_row():
    torch.manual_seed(0)
    y = X[:, :1]
    rows = [(X[:9], y[:9]), (X[9:], y[9:])]
    problem = Problem(nn.Linear(3, 1).double().eval(), "regression", rows, rows, rows, prior_precision=1.0)

    class Flat:
        def fit(self, train_loader): ...

        def variance(self, x):
            return x[:, 0].square()

        def covariance(self, x):
            return x[:, :1, None].square()

    fitted = as_estimator(Flat(), problem).fit(problem.train)
    assert torch.equal(fitted.variance(X), X[:, :1].square())
    assert torch.equal(fitted.variance(X, of=lambda f: 2 * f), 4 * X[:, :1].square())
    with pytest.raises(DataError, match="query"):
        fitted.variance(X[:, :2])
