"""What every baseline does alike: answers by rows, leaves model and random state alone, is saved, and counts passes."""

import pytest
import torch
from torch import nn

from estimators.baselines import (
    SWAG,
    DeepEnsemble,
    GradientNorm,
    MCDropout,
    MembersEstimator,
    MultiHeadEnsemble,
    SubnetworkLaplace,
    TemperatureScaling,
)
from estimators.errors import ModelChangedError, NotFittedError, OptionError, StateError
from estimators.runtime.rng import preserved_random_state
from estimators.training import Recipe

SHORT = Recipe(epochs=3, batch_size=7)
DESCENT = Recipe(epochs=4, batch_size=7, optimizer="sgd", lr=0.02, schedule="constant")


def make(outputs=3):
    """A BatchNorm too: its statistics belong to a member."""
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, outputs)).double()


def held_out(problem):
    """Nine rows of which the network is right about seven."""
    with torch.no_grad():
        y = problem.model(problem.x[:9]).flatten(1).argmax(-1)
    return [(problem.x[:9], (y + (torch.arange(9) < 2)) % 3)]


def build(name, problem, **changed):
    outputs = 3 if problem.kind == "classification" else 2
    retrained = {"make_model": lambda: make(outputs), "recipe": SHORT}
    kind, options = {
        "ensemble": (DeepEnsemble, {**retrained, "n_members": 3, "seed": 5}),
        "dropout": (MCDropout, {**retrained, "rate": 0.3, "n_samples": 6, "seed": 5}),
        "swag": (SWAG, {"recipe": DESCENT, "n_samples": 5, "max_rank": 3, "prior_mean": 0.1}),
        "multi-head": (MultiHeadEnsemble, {"n_heads": 4, "seed": 5, "prior_mean": 0.1}),
        "gradient norm": (GradientNorm, {}),
        "subnetwork": (SubnetworkLaplace, {"n_parameters": 11}),
        "temperature": (TemperatureScaling, {"validation": held_out(problem)}),
    }[name]
    return kind(problem.model, problem.likelihood, **{"prior_precision": problem.delta, **options, **changed})


MEMBERS = ("ensemble", "dropout", "swag", "multi-head")
NAMES = (*MEMBERS, "gradient norm", "subnetwork", "temperature")
every = pytest.mark.parametrize("name", NAMES)
members = pytest.mark.parametrize("name", MEMBERS)


@pytest.fixture
def problem(make_problem):
    found = make_problem("classification", make())
    with torch.no_grad():
        found.model[1].running_mean.add_(0.3)
    return found


@every
def test_the_variance_of_a_row_does_not_depend_on_the_rows_beside_it(name, problem):
    fitted = build(name, problem).fit(problem.loader)
    together, x = fitted.variance(problem.query), problem.query
    apart = torch.cat([fitted.variance(x[:1]), fitted.variance(x[1:4]), fitted.variance(x[4:])])
    assert torch.allclose(apart, together, rtol=1e-10, atol=1e-15)
    assert torch.allclose(fitted.variance(x.flip(0)).flip(0), together, rtol=1e-10, atol=1e-15)


@every
def test_fits_of_equal_options_are_equal_and_queries_repeat_themselves(name, problem):
    first, second = (build(name, problem).fit(problem.loader) for _ in range(2))
    assert torch.equal(first.variance(problem.query), second.variance(problem.query))
    assert torch.equal(first.variance(problem.query), first.variance(problem.query))
    assert torch.equal(first.sample(problem.query, 4, seed=3), second.sample(problem.query, 4, seed=3))


@every
def test_model_and_random_state_are_left_alone_by_fit_and_by_queries(name, problem, untouched):
    with untouched(problem.model):
        fitted = build(name, problem).fit(problem.loader)
        fitted.predict(problem.query)
        fitted.covariance(problem.query)
        fitted.sample(problem.query, 2)
        fitted.variance(problem.query, of=lambda f: f[0] * f[1])


@every
def test_a_fit_does_not_depend_on_the_random_state_that_it_finds(name, problem):
    variances = []
    for seed in (1, 2):
        with preserved_random_state():
            torch.manual_seed(seed)
            variances.append(build(name, problem).fit(problem.loader).variance(problem.query))
    assert torch.equal(*variances)


@every
def test_the_variance_is_the_diagonal_of_the_covariance_and_passes_through_functions(name, problem):
    fitted = build(name, problem).fit(problem.loader)
    covariance = fitted.covariance(problem.query)
    assert covariance.shape == (7, 3, 3)
    assert torch.allclose(covariance.diagonal(dim1=1, dim2=2), fitted.variance(problem.query), rtol=1e-10)
    weights = torch.tensor([[1.0, -1.0, 0.0], [0.5, 2.0, 0.3]], dtype=torch.float64)
    by_hand = torch.einsum("dc,mce,de->md", weights, covariance, weights)
    found = fitted.variance(problem.query, of=lambda f: weights @ f)
    assert torch.allclose(found, by_hand, rtol=1e-9, atol=1e-15)


@every
def test_a_function_of_the_outputs_is_linearised_at_the_predictive_mean(name, problem):
    fitted = build(name, problem).fit(problem.loader)
    mean = fitted.predict(problem.query).mean
    by_hand = torch.einsum("mc,mcd,md->m", 2 * mean, fitted.covariance(problem.query), 2 * mean)
    found = fitted.variance(problem.query, of=lambda f: f.square().sum())
    assert torch.allclose(found, by_hand[:, None], rtol=1e-9, atol=1e-15)


@every
def test_a_loaded_fit_answers_as_the_one_that_was_saved(name, problem, tmp_path):
    fitted = build(name, problem).fit(problem.loader)
    fitted.save(tmp_path / "fit.safetensors")
    loaded = build(name, problem).load(tmp_path / "fit.safetensors")
    assert fitted.fit_report_ == loaded.fit_report_  # queries will add to both
    before, after = (e.predict(problem.query) for e in (fitted, loaded))
    assert torch.allclose(before.probs, after.probs, rtol=1e-12)
    assert torch.allclose(before.mean, after.mean, rtol=1e-12)
    assert torch.allclose(before.epistemic_variance, after.epistemic_variance, rtol=1e-12)
    for method in ("covariance", lambda e: e.sample(problem.query, 3, seed=2)):
        found = [getattr(e, method)(problem.query) if isinstance(method, str) else method(e) for e in (fitted, loaded)]
        assert torch.allclose(*found, rtol=1e-12)


@every
def test_other_options_and_changed_models_are_rejected(name, problem):
    fitted = build(name, problem).fit(problem.loader)
    with pytest.raises(StateError, match="prior_precision"):
        build(name, problem, prior_precision=99.0).load_state_dict(fitted.state_dict())
    with pytest.raises(NotFittedError):
        build(name, problem).predict(problem.query)
    problem.model[0].weight.data.add_(0.1)
    with pytest.raises(ModelChangedError):
        fitted.predict(problem.query)


@members
@pytest.mark.parametrize("kind", ["classification", "binary", "regression"])
def test_the_prediction_of_members_is_that_of_their_mixture(name, kind, make_problem):
    problem = make_problem(kind, make(3 if kind == "classification" else 2))
    fitted = build(name, problem).fit(problem.loader)
    f = fitted.member_outputs(problem.query)
    assert isinstance(fitted, MembersEstimator)
    prediction = fitted.predict(problem.query)
    centre = sum(f) / len(f)
    variance = sum((one - centre) ** 2 for one in f) / (len(f) - 1)
    assert torch.allclose(prediction.mean, centre, rtol=1e-12)
    assert torch.allclose(prediction.epistemic_variance, variance, rtol=1e-9)
    assert torch.equal(prediction.samples, f)
    if kind == "regression":
        assert torch.allclose(prediction.total_variance, variance + 0.6**2, rtol=1e-9)
        return
    link = (lambda one: one.softmax(-1)) if kind == "classification" else torch.sigmoid
    assert torch.allclose(prediction.probs, sum(map(link, f)) / len(f), rtol=1e-12)
    assert prediction.link_approx == "mc"
    tempered = prediction.calibrated(softmax_temperature=2.0)
    assert torch.allclose(tempered.probs, sum(link(one / 2) for one in f) / len(f), rtol=1e-12)
    single = prediction.calibrated(variance_scale=0.0)
    assert torch.allclose(single.probs, link(centre), rtol=1e-12)
    probit = fitted.predict(problem.query, link_approx="probit")
    assert torch.allclose(probit.probs, link(centre / (1 + torch.pi / 8 * variance) ** 0.5), rtol=1e-9)


@members
def test_samples_are_members_drawn_with_replacement(name, problem):
    fitted = build(name, problem).fit(problem.loader)
    f, drawn = fitted.member_outputs(problem.query), fitted.sample(problem.query, 40, seed=1)
    hits = (drawn[:, None] == f).flatten(2).all(-1)  # (40, S)
    assert hits.sum(1).eq(1).all()
    assert hits.any(0).all()  # forty draws of at most six
    few = fitted.predict(problem.query, n_samples=4)
    assert few.samples.shape == (4, 7, 3)
    assert torch.allclose(few.probs, few.samples.softmax(-1).mean(0), rtol=1e-12)
    assert torch.equal(few.epistemic_variance, fitted.variance(problem.query))


@pytest.mark.parametrize("name", [name for name in MEMBERS if name != "multi-head"])  # whose last layer is linear
def test_outputs_of_several_dimensions_keep_their_shape(name, make_problem):
    def wide():
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Unflatten(1, (2, 3))).double()

    problem = make_problem("regression", wide())
    fitted = build(name, problem, **({} if name == "swag" else {"make_model": wide})).fit(problem.loader)
    prediction = fitted.predict(problem.query)
    assert fitted.variance(problem.query).shape == prediction.mean.shape == (7, 2, 3)
    assert torch.allclose(prediction.epistemic_variance, fitted.variance(problem.query), rtol=1e-10)
    assert prediction.samples.shape == fitted.member_outputs(problem.query).shape == (len(prediction.samples), 7, 2, 3)
    assert fitted.covariance(problem.query).shape == (7, 6, 6)
    assert fitted.sample(problem.query, 2).shape == (2, 7, 2, 3)


@members
@pytest.mark.parametrize("bad", ["bridge", "MC"])
def test_an_unknown_link_is_rejected(name, bad, problem):
    fitted = build(name, problem).fit(problem.loader)
    with pytest.raises(OptionError, match="link_approx"):
        fitted.predict(problem.query, link_approx=bad)
    with pytest.raises(OptionError, match="n_samples >= 1"):
        fitted.predict(problem.query, n_samples=0)


def test_the_passes_of_a_fit_are_the_rows_that_it_trained_on_and_looked_at(problem):
    """N = 20 rows. A check is two forwards of all of them; SHORT has 3 epochs, DESCENT 4; a forward is a third."""
    checks = {"checks": 2 / 3}
    rows = {name: build(name, problem).fit(problem.loader).fit_report_ for name in NAMES}
    compared = {name: report.passes.pop("self-check") for name, report in rows.items()}
    assert all(0 < spent < 8 for spent in compared.values())  # one row of each batch alone; slopes where they are used
    assert rows["ensemble"].passes == pytest.approx({**checks, "training": 2 * 3})
    four_passes_of_four_rows = 4 * 4 / 20 / 3  # that look for randomness outside of the dropout layers
    assert rows["dropout"].passes == pytest.approx({"checks": 2 / 3 + four_passes_of_four_rows, "training": 3})
    assert rows["swag"].passes == pytest.approx({**checks, "training": 4})
    assert rows["gradient norm"].passes == pytest.approx(checks)
    assert rows["temperature"].passes == pytest.approx({**checks, "validation": 3 * 9 / 20 / 3})
    found = rows["subnetwork"].passes
    # the outputs twice (for the number of them, and for Λ), and a forward and three backwards for the Jacobian
    assert found["curvature"] == pytest.approx(3 * 1 / 3 + 3 * 2 / 3)
    # the diagonal: a forward and three backwards for the layers, from which the norm follows; a row to find them
    assert found["choice"] == pytest.approx(1 / 3 + 3 * 2 / 3, abs=0.1)
    assert rows["ensemble"].total_passes == pytest.approx(6 + 2 / 3)


def test_rows_of_the_jacobian_are_counted(make_problem):
    problem = make_problem("classification")
    fitted = build("subnetwork", problem, chosen_by="magnitude").fit(problem.loader)
    assert fitted.fit_report_.passes["curvature"] == pytest.approx(3 / 3 + 3 * 2 / 3)
