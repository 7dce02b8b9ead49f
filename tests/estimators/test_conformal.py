"""Split conformal intervals and sets: by hand, their coverage over splits, and beside MAPIE."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from estimators import Bernoulli, Categorical, Gaussian, LinearizedLaplace, SplitConformal, tune
from estimators.baselines import MAP, GaussianProcess, Mixture
from estimators.calibration.conformal_scores import aps_scores, conformal_threshold, has_threshold, lac_scores
from estimators.errors import DataError, NotFittedError, OptionError, StateError, UnsupportedError
from estimators.tuning import Tuned

SPLITS, N, M, LEVEL = 200, 40, 60, 0.9
RANK = math.ceil((N + 1) * LEVEL)


class Fixed:
    """A prediction that is a function of the row, underconfident and biased: coverage holds for any."""

    def __init__(self, likelihood):
        self.likelihood = likelihood

    def predict(self, x):
        mean = 0.4 * x[:, :3] + 0.3
        return self.likelihood.predict(mean, (x[:, 3:4] ** 2 + 0.1).expand_as(mean), None)


def rows(kind, n, generator):
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    f = x[:, :3] + x[:, 3:4].abs() * noise
    return x, {"regression": f, "classification": f.argmax(-1), "binary": (f > 0).double()}[kind]


def likelihood_of(kind):
    return {"regression": Gaussian(0.7), "classification": Categorical(), "binary": Bernoulli()}[kind]


def covered(conformal, x, y):
    if conformal.kind_ == "regression":
        low, high = conformal.interval(x, LEVEL)
        return ((low <= y) & (y <= high)).double()
    found = conformal.predict_set(x, LEVEL)
    return found.gather(-1, y.long()[..., None])[..., 0].double()


def test_the_threshold_is_the_order_statistic_of_the_finite_sample_correction():
    scores = torch.arange(1.0, 20.0)[torch.randperm(19, generator=torch.Generator().manual_seed(0))]
    assert conformal_threshold(scores, level=0.9) == 18  # ⌈20 · .9⌉
    assert conformal_threshold(scores, level=0.5) == 10
    assert conformal_threshold(torch.arange(1.0, 10.0), level=0.9) == 9  # ⌈10 · .9⌉ = 9, and not 10 by rounding
    assert conformal_threshold(torch.arange(8.0), level=0.9) == math.inf
    assert conformal_threshold(torch.tensor([2.0, 1.0, 2.0, 2.0, 1.0]), level=0.5) == 2  # the third of 1, 1, 2, 2, 2
    assert [has_threshold(n, level=0.9) for n in (8, 9)] == [False, True]
    assert conformal_threshold(torch.zeros(2, 3), level=0.9).tolist() == [math.inf] * 3


def test_scores_of_classes_by_hand_with_ties():
    probs = torch.tensor([[0.3, 0.5, 0.2], [0.4, 0.4, 0.2], [0.0, 1.0, 0.0]], dtype=torch.float64)
    by_hand = [[0.8, 0.5, 1.0], [0.4, 0.8, 1.0], [1.0, 1.0, 1.0]]  # equal probabilities in the order of classes
    assert aps_scores(probs.log()) == pytest.approx(np.array(by_hand))
    u = torch.tensor([0.25, 0.5, 0.0], dtype=torch.float64)
    by_hand = [[0.575, 0.125, 0.85], [0.2, 0.6, 0.9], [1.0, 0.0, 1.0]]
    assert aps_scores(probs.log(), u) == pytest.approx(np.array(by_hand))
    assert lac_scores(probs.log()).tolist()[2] == [math.inf, 0.0, math.inf]


def test_sets_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]]).double().log()
    network = SimpleNamespace(predict=lambda x: Categorical().predict(x, torch.zeros_like(x), None))
    y = torch.tensor([1, 0, 2, 1])  # p_y = .3, .6, .6, .8; APS: .8, .6, .6, .8
    lac = SplitConformal(network).fit([(logits[:3], y[:3]), (logits[3:], y[3:])])
    assert lac.threshold(0.6) == pytest.approx(-math.log(0.6))  # the third of −log of .8, .6, .6, .3
    query = torch.tensor([[0.7, 0.2, 0.1], [0.39, 0.6, 0.01], [0.4, 0.3, 0.3]]).double().log()
    assert lac.predict_set(query, 0.59).tolist() == [[True, False, False], [False, True, False], [False] * 3]
    aps = SplitConformal(network, score="aps").fit([(logits, y)])
    assert aps.threshold(0.6) == pytest.approx(0.8)
    assert aps.predict_set(query, 0.79).tolist() == [[True, False, False], [False, True, False], [True, True, False]]
    assert aps.predict_set(query, 0.9).all()  # no threshold: every class
    assert not aps.has_threshold(0.9)


def test_sets_of_two_classes_by_hand():
    log_odds = torch.tensor([0.8, 0.7, 0.1, 0.6]).double().logit()[:, None]
    network = SimpleNamespace(predict=lambda x: Bernoulli().predict(x, torch.zeros_like(x), None))
    y = torch.tensor([1.0, 1.0, 0.0, 0.0])[:, None]  # p_y = .8, .7, .9, .4
    conformal = SplitConformal(network).fit([(log_odds, y)])
    assert conformal.threshold(0.6) == pytest.approx(-math.log(0.7))  # the third of −log of .9, .8, .7, .4
    query = torch.tensor([0.9, 0.71, 0.6, 0.25]).double().logit()[:, None]  # the classes 0 and 1 in this order
    expected = [[False, True], [False, True], [False, False], [True, False]]
    assert conformal.predict_set(query, 0.6).squeeze(1).tolist() == expected


@pytest.mark.parametrize("score", ["lac", "aps", "randomized_aps"])
def test_the_set_of_a_validation_row_has_its_label_whatever_the_batch(score):
    """The outputs of a float32 network for a row alone differ by round-off from those in a batch, as its score does."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(50, 200), nn.Tanh(), nn.Linear(200, 5))
    x = torch.randn(40, 50)
    with torch.no_grad():
        y = network(x).argmax(-1)
    conformal = SplitConformal(MAP(network, "classification").fit([(x, y)]), score=score).fit([(x, y)])
    together, apart = conformal.predict_set(x), torch.cat([conformal.predict_set(row[None]) for row in x])
    assert torch.equal(together, apart)
    assert int(apart.gather(-1, y[:, None]).sum()) >= math.ceil(41 * 0.9)


def test_intervals_by_hand():
    x, y = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([[0.5], [3.0], [2.0], [3.5]])
    of_row = SimpleNamespace(predict=lambda x: Gaussian(1.0).predict(x, x**2, None))
    plain = SplitConformal(of_row, score="residual").fit([(x, y)])  # .5, 2, 0, .5
    low, high = plain.interval(torch.tensor([[7.0]]), 0.6)
    assert (low.item(), high.item()) == (6.5, 7.5)
    scaled = SplitConformal(of_row).fit([(x, y)])  # .5, 2/√2, 0, .5/√10
    low, high = scaled.interval(torch.tensor([[2.0]]), 0.6)
    assert (low.item(), high.item()) == pytest.approx((2 - 0.5 * 5**0.5, 2 + 0.5 * 5**0.5))
    low, high = scaled.interval(x, 0.95)
    assert (low == -math.inf).all()
    assert (high == math.inf).all()


@pytest.mark.parametrize(
    ("kind", "score"),
    [
        ("regression", "residual"),
        ("regression", "scaled_residual"),
        *((kind, score) for kind in ("classification", "binary") for score in ("lac", "aps", "randomized_aps")),
    ],
)
def test_every_output_is_covered_at_the_level_over_200_splits(kind, score):
    generator, found = torch.Generator().manual_seed(7), []
    conformal = SplitConformal(Fixed(likelihood_of(kind)), score=score)
    for _ in range(SPLITS):
        x, y = rows(kind, N + M, generator)
        conformal.fit([(x[:15], y[:15]), (x[15:N], y[15:N])])
        found.append(covered(conformal, x[N:], y[N:]).mean(0))
    shares = torch.stack(found)
    error = shares.std(0) / SPLITS**0.5
    assert (error < 0.007).all()
    difference = shares.mean(0) - RANK / (N + 1)  # exact without ties
    assert (difference > -3.5 * error).all()
    if score != "aps":  # whose score of the last class is 1 in every row
        assert (difference < 3.5 * error).all()


def test_randomised_sets_do_not_depend_on_other_rows_and_have_a_seed():
    generator = torch.Generator().manual_seed(1)
    x, y = rows("classification", 50, generator)
    fits = [
        SplitConformal(Fixed(Categorical()), score="randomized_aps", seed=s).fit([(x[:30], y[:30])]) for s in (0, 0, 1)
    ]
    first, second, other = (fit.predict_set(x[30:], 0.8) for fit in fits)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.cat([fits[0].predict_set(row[None], 0.8) for row in x[30:]]), first)
    plain = SplitConformal(Fixed(Categorical()), score="aps").fit([(x[:30], y[:30])])
    assert first.sum() < plain.predict_set(x[30:], 0.8).sum()


@pytest.fixture
def laplace():
    torch.manual_seed(0)
    x, y = torch.randn(60, 4).double(), torch.randn(60, 2).double()
    likelihood = Gaussian(0.8, target_shift=[5.0, -3.0], target_scale=[10.0, 0.1])
    estimator = LinearizedLaplace(nn.Linear(4, 2).double(), likelihood, prior_precision=2.0).fit([(x[:20], y[:20])])
    return estimator, x, y


def test_intervals_are_in_the_units_of_the_target(laplace):
    estimator, x, y = laplace
    conformal = SplitConformal(estimator).fit([(x[20:35], y[20:35]), (x[35:50], y[35:50])])
    standard = estimator.predict_uncalibrated(x[20:50])
    scores = ((y[20:50] - standard.mean).abs() / standard.std).sort(dim=0).values
    assert torch.allclose(conformal.scores_, scores)
    query = estimator.predict_uncalibrated(x[50:])
    low, high = conformal.interval(x[50:])
    shift, scale = torch.tensor([5.0, -3.0]).double(), torch.tensor([10.0, 0.1]).double()
    assert torch.allclose(low, shift + scale * (query.mean - scores[27] * query.std))  # ⌈31 · .9⌉ = 28
    assert torch.allclose(high, shift + scale * (query.mean + scores[27] * query.std))


def test_a_tuned_estimator_is_calibrated_too(laplace):
    estimator, x, y = laplace
    tuned = tune(estimator, [(x[20:40], y[20:40])], option=None)
    conformal = SplitConformal(tuned).fit([(x[40:], y[40:])])
    low, high = conformal.interval(x[:5])
    half = conformal.threshold() * tuned.predict(x[:5]).std
    assert torch.allclose(high - low, 2 * half)


def others(x, y):
    """Pairs of fits with other predictions by name; those of the first two and of the mixture have equal tensors."""
    torch.manual_seed(0)
    model, rows, validation = nn.Linear(4, 2).double().eval(), [(x[:20], y[:20])], [(x[20:40], y[20:40])]

    def laplace(prior, **fit):
        return LinearizedLaplace(model, Gaussian(0.7), prior_precision=prior).fit(rows, **fit)

    def process(amplitude):
        return GaussianProcess(model, Gaussian(0.7), lengthscale=1.0, amplitude=amplitude).fit(rows)

    def mixture(prior):
        return Mixture([laplace(prior), laplace(2.0)]).fit(rows)

    return {
        "sigma": (MAP(model, Gaussian(0.1)).fit(rows), MAP(model, Gaussian(10.0)).fit(rows)),
        "prior": (laplace(1.0), laplace(1000.0)),
        "calibration": (laplace(2.0, val_loader=validation), laplace(2.0)),
        "validation rows": (laplace(2.0, val_loader=validation), laplace(2.0, val_loader=[(x[:20], y[:20])])),
        "tuning": (tune(laplace(2.0), validation), tune(laplace(2.0), [(x[:20], 3 * y[:20])])),
        "component": (mixture(1.0), mixture(30.0)),
        "amplitude": (process(1.0), process(1.0 + 1e-9)),
    }


@pytest.mark.filterwarnings("ignore:tuning ended at:estimators.errors.TuningBoundaryWarning")
def test_scores_of_a_fit_with_other_options_or_calibration_are_rejected(laplace):
    _, x, y = laplace
    for fitted, other in others(x, y).values():
        state = SplitConformal(fitted).fit([(x[40:50], y[40:50])]).state_dict()
        SplitConformal(fitted).load_state_dict(state)
        with pytest.raises(StateError, match="the scores of this estimator"):
            SplitConformal(other).load_state_dict(state)


@pytest.mark.filterwarnings("ignore:tuning ended at:estimators.errors.TuningBoundaryWarning")
def test_scores_are_loaded_into_the_same_fit_whatever_it_cost(laplace):
    """The same fit again: from a file, made in another time, and with other counts of passes."""
    _, x, y = laplace
    torch.manual_seed(0)
    model, rows, validation = nn.Linear(4, 2).double().eval(), [(x[:20], y[:20])], [(x[20:40], y[20:40])]
    new = partial(LinearizedLaplace, model, Gaussian(0.7), prior_precision=2.0)
    fits = [new().fit(rows, val_loader=validation) for _ in range(2)]
    fits[1].variance(x)
    assert fits[0].calibration_.seconds != fits[1].calibration_.seconds
    state = SplitConformal(fits[0]).fit([(x[40:50], y[40:50])]).state_dict()
    for same in (fits[1], new().load_state_dict(fits[0].state_dict())):
        SplitConformal(same).load_state_dict(state)
    tuned = tune(new().fit(rows), validation)
    state = SplitConformal(tuned).fit([(x[40:50], y[40:50])]).state_dict()
    SplitConformal(Tuned.from_state_dict(tuned.state_dict(), new())).load_state_dict(state)
    mixture = Mixture([new(), new()]).fit(rows)
    state = SplitConformal(mixture).fit([(x[40:50], y[40:50])]).state_dict()
    again = Mixture([new(), new()]).load_state_dict(mixture.state_dict())
    SplitConformal(again).load_state_dict(state)


def test_scores_of_another_kind_of_prediction_are_rejected(laplace):
    estimator, x, y = laplace
    state = SplitConformal(estimator).fit([(x[20:50], y[20:50])]).state_dict()
    with pytest.raises(StateError, match=r"score, 'lac'"):
        SplitConformal(estimator, score="lac").load_state_dict(state)


class Scaled(nn.Module):
    """A linear classifier of inputs that are multiplied by a scale (3,), which all rows share."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x, scale):
        return self.layer(x * scale)


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.filterwarnings("ignore:tuning ended at:estimators.errors.TuningBoundaryWarning")
def test_sets_of_a_row_do_not_depend_on_the_number_of_rows_with_shared_inputs(tuned):
    generator = torch.Generator().manual_seed(1)
    x, scale = torch.randn(40, 3, generator=generator).double(), torch.tensor([2.0, 1.0, 3.0]).double()
    y = torch.randint(3, (40,), generator=generator)

    def rows_of(*index):
        return {"x": x[list(index)], "scale": scale}

    batches = [(rows_of(*range(i, j)), y[i:j]) for i, j in ((0, 3), (3, 17), (17, 40))]
    estimator = LinearizedLaplace(Scaled().double().eval(), "classification", prior_precision=0.5).fit(batches[1:])
    estimator = tune(estimator, batches[1:]) if tuned else estimator
    conformal = SplitConformal(estimator, score="randomized_aps")
    expected = [conformal._scored(rows_of(i), y[i : i + 1])[1] for i in range(4)]
    for n in (2, 3, 4):  # 3 rows are as many as the scale has entries
        assert torch.allclose(conformal._scored(rows_of(*range(n)), y[:n])[1], torch.cat(expected[:n]), rtol=1e-10)
    of_loader = conformal.fit(batches).scores_
    assert torch.allclose(of_loader, conformal._scored(rows_of(*range(40)), y)[1].sort().values, rtol=1e-10)


@pytest.mark.parametrize("score", ["auto", "residual"])
def test_saved_scores_are_loaded_into_the_same_fit_alone(laplace, score, tmp_path):
    estimator, x, y = laplace
    fitted = SplitConformal(estimator, score=score).fit([(x[20:50], y[20:50])])
    fitted.save(tmp_path / "conformal.safetensors")
    estimator.save(tmp_path / "laplace.safetensors")
    again = LinearizedLaplace(estimator.model, estimator.likelihood, prior_precision=2.0)
    again.load(tmp_path / "laplace.safetensors")
    loaded = SplitConformal(again, score=score).load(tmp_path / "conformal.safetensors")
    assert all(map(torch.equal, loaded.interval(x[50:]), fitted.interval(x[50:])))
    other = "residual" if score == "auto" else "auto"
    with pytest.raises(StateError, match="score"):
        SplitConformal(again, score=other).load(tmp_path / "conformal.safetensors")
    refitted = LinearizedLaplace(estimator.model, estimator.likelihood, prior_precision=2.0).fit([(x[:21], y[:21])])
    with pytest.raises(StateError, match="estimator"):
        SplitConformal(refitted, score=score).load(tmp_path / "conformal.safetensors")
    with pytest.raises(StateError, match="SplitConformal"):
        SplitConformal(again, score=score).load(tmp_path / "laplace.safetensors")


def test_what_cannot_be_is_an_error(laplace):
    estimator, x, y = laplace
    with pytest.raises(OptionError, match="predict"):
        SplitConformal(nn.Linear(2, 2))
    with pytest.raises(OptionError, match="score"):
        SplitConformal(estimator, score="thr")
    with pytest.raises(OptionError, match="randomized_aps"):
        SplitConformal(estimator, seed=1)
    with pytest.raises(NotFittedError):
        SplitConformal(estimator).interval(x)
    with pytest.raises(OptionError, match="score"):
        SplitConformal(estimator, score="lac").fit([(x, y)])
    conformal = SplitConformal(estimator).fit([(x[20:], y[20:])])
    with pytest.raises(UnsupportedError, match="interval"):
        conformal.predict_set(x)
    with pytest.raises(OptionError, match="level"):
        conformal.interval(x, 90)
    with pytest.raises(DataError, match="NaN"):
        SplitConformal(estimator).fit([(x, torch.full_like(y, math.nan))])
    classes = SplitConformal(Fixed(Categorical())).fit([(x, torch.zeros(60, dtype=torch.long))])
    with pytest.raises(UnsupportedError, match="predict_set"):
        classes.interval(x)
    with pytest.raises(DataError, match="hard labels"):
        SplitConformal(Fixed(Bernoulli())).fit([(x, torch.full((60, 3), 0.5).double())])
    certain = SimpleNamespace(predict=lambda x: Gaussian().predict(x, torch.zeros_like(x) - 1, None))
    with pytest.raises(DataError, match="positive"):
        SplitConformal(certain).fit([(y, y)])


class Stored:
    """Predictions by the index of a row, as scikit-learn has them."""

    def __init__(self, values, classes=None):
        self.values, self.classes_, self.n_features_in_ = values, classes, 1

    def fit(self, x, y):  # noqa: ARG002
        return self

    def __sklearn_is_fitted__(self):
        return True

    def predict(self, x):
        found = self.values[np.asarray(x)[:, 0].astype(int)]
        return found if self.classes_ is None else found.argmax(-1)

    def predict_proba(self, x):
        return self.values[np.asarray(x)[:, 0].astype(int)]


@pytest.mark.filterwarnings("ignore")
def test_intervals_are_those_of_mapie():
    pytest.importorskip("mapie", reason="a test oracle")
    from mapie.conformity_scores import ResidualNormalisedScore
    from mapie.regression import SplitConformalRegressor
    from sklearn.base import BaseEstimator, RegressorMixin

    class Regressor(Stored, RegressorMixin, BaseEstimator):
        pass

    x, y = rows("regression", 100, torch.Generator().manual_seed(5))
    network = Fixed(Gaussian(0.7))
    prediction, index = network.predict(x), np.arange(100.0)[:, None]
    for score in ("residual", "scaled_residual"):
        low, high = SplitConformal(network, score=score).fit([(x[:40], y[:40])]).interval(x[40:], 0.85)
        for c in range(3):
            std = Regressor(prediction.std[:, c].numpy())
            normalised = ResidualNormalisedScore(residual_estimator=std, prefit=True, sym=True)
            mapie = SplitConformalRegressor(
                Regressor(prediction.mean[:, c].numpy()),
                confidence_level=0.85,
                conformity_score="absolute" if score == "residual" else normalised,
                prefit=True,
            ).conformalize(index[:40], y[:40, c].numpy())
            expected = mapie.predict_interval(index[40:])[1][..., 0]
            assert np.abs(np.stack([low[:, c], high[:, c]], -1) - expected).max() < 1e-7  # MAPIE adds 1e-8 to scores


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("score", ["lac", "aps"])
def test_sets_are_those_of_mapie(score):
    pytest.importorskip("mapie", reason="a test oracle")
    from mapie.classification import SplitConformalClassifier
    from sklearn.base import BaseEstimator, ClassifierMixin

    class Classifier(Stored, ClassifierMixin, BaseEstimator):
        pass

    x, y = rows("classification", 300, torch.Generator().manual_seed(6))
    network = Fixed(Categorical())
    log_probs, index = network.predict(x).log_probs, np.arange(300.0)[:, None]
    mapie = SplitConformalClassifier(
        Classifier(log_probs.exp().numpy(), np.arange(3)),
        confidence_level=0.85,
        conformity_score=score,
        prefit=True,
        random_state=3,
    ).conformalize(index[:100], y[:100].numpy())
    if score == "lac":
        found = SplitConformal(network).fit([(x[:100], y[:100])]).predict_set(x[100:], 0.85)
        expected = mapie.predict_set(index[100:])[1]
    else:  # MAPIE's scores are always randomised; its numbers are one less u
        u = [1 - torch.from_numpy(np.random.RandomState(3).uniform(size=n)) for n in (100, 200)]
        known = aps_scores(log_probs[:100], u[0]).gather(1, y[:100, None])[:, 0]
        found = aps_scores(log_probs[100:], u[1]) <= conformal_threshold(known, level=0.85)
        options = {"include_last_label": "randomized"}
        expected = mapie.predict_set(index[100:], conformity_score_params=options)[1]
    assert np.array_equal(found.numpy(), expected[..., 0])
