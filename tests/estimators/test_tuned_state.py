"""A tuned estimator is saved and loaded whole: its fit, its calibration and everything that was tried."""

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from estimators import (
    FineTune,
    Gaussian,
    LastLayerLaplace,
    LinearizedLaplace,
    LinearResponse,
    MeanAbsolute,
    Pointwise,
    PosteriorDraws,
    RegVar,
    Tuned,
    optimize_prior_precision,
    tune,
)
from estimators.baselines.dropout import MCDropout
from estimators.baselines.ensemble import DeepEnsemble
from estimators.baselines.gradient_norm import GradientNorm
from estimators.baselines.laplace_torch import LaplaceTorch
from estimators.baselines.map import MAP
from estimators.baselines.multi_head import MultiHeadEnsemble
from estimators.baselines.swag import SWAG
from estimators.errors import (
    CalibrationNotSavedWarning,
    ModelChangedError,
    NotFittedError,
    StateError,
    UnsupportedError,
)
from estimators.laplace import SubnetworkLaplace
from estimators.training import Recipe
from estimators.tuning import CalibrationGrid

pytestmark = [
    pytest.mark.filterwarnings("ignore::estimators.errors.TuningBoundaryWarning"),
    pytest.mark.filterwarnings("ignore::estimators.errors.NotConvergedWarning"),
]
GRID = CalibrationGrid((0.1, 3.0), (0.5, 2.0), (0.8, 1.4))
SHORT = Recipe(epochs=2, batch_size=7, optimizer="sgd", lr="auto", schedule="constant")


def network(seed=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()


def rows(kind, seed=1, n=23):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return list(zip(x.split(9), (y if kind == "regression" else y.argmax(1)).split(9), strict=True))


FITS = {
    "cholesky": (LinearizedLaplace, {"inverse": "cholesky"}),
    "dual": (LinearizedLaplace, {"inverse": "dual"}),
    "kron": (LinearizedLaplace, {"hessian_structure": "kron"}),
    "ekfac": (LinearizedLaplace, {"hessian_structure": "ekfac"}),
    "low rank": (LinearizedLaplace, {"hessian_structure": "lowrank", "rank": 5}),
    "last layer": (LastLayerLaplace, {}),
    "last layer kron": (LastLayerLaplace, {"hessian_structure": "kron"}),
    "draws": (RegVar, {"regularizer": PosteriorDraws(4), "solver": LinearResponse()}),
    "bounds": (RegVar, {"regularizer": PosteriorDraws(4, variance_estimate="bounds"), "solver": LinearResponse()}),
    "fine tune": (RegVar, {"regularizer": PosteriorDraws(4), "solver": FineTune(recipe=SHORT)}),
    "mean absolute": (RegVar, {"regularizer": MeanAbsolute(), "solver": LinearResponse()}),
    "map": (MAP, {}),
    "gradient norm": (GradientNorm, {}),
    "subnetwork": (SubnetworkLaplace, {"n_parameters": 7}),
    "swag": (SWAG, {"recipe": SHORT, "n_samples": 3}),
    "dropout": (MCDropout, {"rate": 0.1, "make_model": network, "recipe": Recipe(epochs=2), "n_samples": 3}),
    "ensemble": (DeepEnsemble, {"make_model": network, "recipe": Recipe(epochs=2), "n_members": 3}),
    "heads": (MultiHeadEnsemble, {"n_heads": 3}),
}
NEEDS_DATA = {
    "cg": (LinearizedLaplace, {"inverse": "cg"}),
    "pointwise": (RegVar, {"regularizer": Pointwise(), "solver": LinearResponse()}),
}


def build(name, kind="classification", **changed):
    estimator, options = {**FITS, **NEEDS_DATA}[name]
    likelihood = Gaussian(0.6) if kind == "regression" else kind
    return estimator(changed.pop("model", None) or network(), likelihood, **{**options, **changed})


def tuned_of(name, kind="classification", *, option="prior_precision", values=(0.3, 4.0), **changed):
    fitted = build(name, kind, **changed).fit(rows(kind))
    return tune(fitted, rows(kind, seed=2), option=option, values=values, grid=GRID)


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one == other


def assert_same_predictions(tuned, again, kind="classification"):
    x = rows(kind, seed=5)[0][0]
    before, after = tuned.predict(x), again.predict(x)
    for field in fields(before):
        assert same(getattr(before, field.name), getattr(after, field.name)), field.name


@pytest.mark.parametrize("name", FITS)
def test_a_tuned_estimator_predicts_after_load_as_before_bit_for_bit(name, tmp_path):
    tuned = tuned_of(name)
    assert (tuned.calibration.variance_scale, tuned.calibration.noise_or_temperature) != (1.0, 1.0)
    tuned.save(tmp_path / "tuned.safetensors")
    again = Tuned.load(tmp_path / "tuned.safetensors", build(name))
    assert_same_predictions(tuned, again)
    assert again.estimator.prior_precision == tuned.value == again.value


@pytest.mark.parametrize("name", ["cholesky", "last layer", "draws", "map", "ensemble"])
@pytest.mark.parametrize("option", ["sigma_noise", "prior_precision", None])
def test_the_noise_and_its_factor_are_kept(name, option, tmp_path):
    values = {"sigma_noise": (0.3, torch.tensor([0.4, 0.9, 1.5])), "prior_precision": (0.3,), None: None}[option]
    tuned = tuned_of(name, "regression", option=option, values=values)
    tuned.save(tmp_path / "tuned.safetensors")
    again = Tuned.load(tmp_path / "tuned.safetensors", build(name, "regression"))
    assert_same_predictions(tuned, again, "regression")
    sigma, before = (torch.as_tensor(t.estimator.likelihood.sigma_noise) for t in (again, tuned))
    assert torch.equal(sigma.double(), before.double())


@pytest.mark.parametrize("name", NEEDS_DATA)
def test_what_solves_at_query_time_goes_on_with_its_data(name):
    tuned = tuned_of(name)
    again = Tuned.from_state_dict(tuned.state_dict(), build(name))
    with pytest.raises(NotFittedError, match="attach_data"):
        again.predict(rows("classification")[0][0])
    again.estimator.attach_data(rows("classification"))
    assert_same_predictions(tuned, again)


def test_the_whole_table_of_tuning_is_kept(tmp_path):
    tuned = tuned_of("cholesky")
    tuned.save(tmp_path / "tuned.safetensors")
    again = Tuned.load(tmp_path / "tuned.safetensors", build("cholesky"))
    assert again.to_dict() == tuned.to_dict()
    for before, after in zip(tuned.trials, again.trials, strict=True):
        assert torch.equal(before.calibration.scores, after.calibration.scores)
        assert before.calibration.grid == after.calibration.grid
    assert torch.equal(again.score_grid().scores, tuned.score_grid().scores)
    assert (again.at_boundary, again.refit_kind, again.fits) == (tuned.at_boundary, tuned.refit_kind, tuned.fits)


def test_a_failed_value_and_an_evidence_are_kept(tmp_path):
    fitted = build("cholesky", curvature="hessian", prior_precision=1e4).fit(rows("classification"))
    tuned = tune(fitted, rows("classification", seed=2), values=[1e-9], grid=GRID)
    assert [point.failure is None for point in tuned.trials] == [False, True]
    evidence = optimize_prior_precision(build("cholesky").fit(rows("classification")), method="marglik")
    for before, options in ((tuned, {"curvature": "hessian"}), (evidence, {})):
        before.save(tmp_path / "tuned.safetensors")
        again = Tuned.load(tmp_path / "tuned.safetensors", build("cholesky", **options))
        assert again.to_dict() == before.to_dict()
        assert_same_predictions(before, again)


@pytest.mark.parametrize(
    ("option", "values", "given"),
    [
        ("solver.tol", [1e-3, np.float32(1e-2)], {"solver": LinearResponse(1e-9)}),
        ("subset_of_weights", ["last_layer", ["0.*", "2.bias"]], {}),
        ("prior_precision", [{"0.*": 0.2, "*": 4.0}, torch.tensor(0.5)], {}),
    ],
)
def test_an_option_of_any_type_is_kept(option, values, given):
    tuned = tuned_of("draws", option=option, values=values, **given)
    for point in tuned.trials:
        state = Tuned(
            point.calibration, tuned.option, tuned.trials, point, 1.0, 23, estimator=point_fit(tuned, point)
        ).state_dict()
        again = Tuned.from_state_dict(state, build("draws", **given))
        assert same(again.value, point.value)


def point_fit(tuned, point):
    return tuned.option.refit(tuned.estimator, point.value)


def test_a_tuned_object_is_the_one_of_the_estimator_at_hand():
    solvers = [LinearResponse(1e-2), LinearResponse(1e-9)]
    tuned = tuned_of("draws", option="solver", values=solvers)
    state = tuned.state_dict()
    again = Tuned.from_state_dict(state, build("draws", solver=LinearResponse(tuned.value.tol)))
    assert_same_predictions(tuned, again)
    with pytest.raises(StateError, match=r"chosen solver, LinearResponse\(.*construct the estimator with"):
        Tuned.from_state_dict(state, build("draws", solver=LinearResponse(0.5)))


def test_the_estimator_that_is_passed_to_load_stays_as_it_is():
    given = build("cholesky", prior_precision=7.0)
    again = Tuned.from_state_dict(tuned_of("cholesky", prior_precision=2.0).state_dict(), given)
    assert given.prior_precision == 7.0
    assert not hasattr(given, "objective_")
    assert again.estimator is not given


def test_a_fit_and_a_tuned_fit_are_not_mistaken_for_each_other(tmp_path):
    tuned = tuned_of("cholesky")
    tuned.save(tmp_path / "tuned.safetensors")
    with pytest.raises(StateError, match=r"tuned one.*Tuned\.load"):
        build("cholesky", prior_precision=tuned.value).load(tmp_path / "tuned.safetensors")
    with pytest.raises(StateError, match=r"tuned estimator.*name another file"):
        build("cholesky", prior_precision=tuned.value).fit(
            rows("classification"), checkpoint=tmp_path / "tuned.safetensors"
        )
    build("cholesky").fit(rows("classification")).save(tmp_path / "fit.safetensors")
    with pytest.raises(StateError, match=r"not tuned.*estimator\.load"):
        Tuned.load(tmp_path / "fit.safetensors", build("cholesky"))


def test_a_tuned_fit_saved_alone_warns_of_what_is_lost(tmp_path):
    tuned = tuned_of("cholesky")
    with pytest.warns(CalibrationNotSavedWarning, match=r"variance_scale=.*softmax_temperature=.*tuned\.save"):
        tuned.estimator.save(tmp_path / "fit.safetensors")
    again = Tuned.from_state_dict(tuned.state_dict(), build("cholesky"))
    with pytest.warns(CalibrationNotSavedWarning):
        again.estimator.state_dict()
    again.estimator.fit(rows("classification")).state_dict()  # a fit anew has not been tuned
    loaded = build("cholesky", prior_precision=tuned.value).load(tmp_path / "fit.safetensors")
    loaded.state_dict()
    x = rows("classification")[0][0]
    assert torch.equal(loaded.predict(x).probs, tuned.estimator.predict(x).probs)
    untouched = tune(loaded, rows("classification", seed=2), option=None, grid=CalibrationGrid((), (), ()))
    untouched.estimator.state_dict()


def test_a_tuned_state_of_other_options_or_another_model_is_rejected():
    state = tuned_of("draws").state_dict()
    with pytest.raises(StateError, match=r"regularizer\.n_draws=5"):
        Tuned.from_state_dict(state, build("draws", regularizer=PosteriorDraws(5)))
    with pytest.raises(StateError, match="of LinearizedLaplace"):
        Tuned.from_state_dict(state, build("cholesky"))
    with pytest.raises(ModelChangedError):
        Tuned.from_state_dict(state, build("draws", model=network(4)))
    with pytest.raises(StateError, match="calibration of format 2"):
        Tuned.from_state_dict({**state, "tuning": json.dumps({"format": 9})}, build("draws"))
    solver = tuned_of("fine tune", option="solver.lam", values=[1e-4]).state_dict()
    with pytest.raises(StateError, match=r"option that was tuned, solver\.lam"):
        Tuned.from_state_dict(solver, build("draws"))


def test_what_cannot_be_saved_says_so():
    tuned = tuned_of("cholesky")
    laplace = LaplaceTorch(network(), "classification")
    with pytest.raises((UnsupportedError, NotFittedError)):
        Tuned(tuned.calibration, tuned.option, tuned.trials, tuned.chosen, 1.0, 23, estimator=laplace).state_dict()


def load_and_compare(directory):
    """Run by a process of its own."""
    path = Path(directory)
    again = Tuned.load(path / "tuned.safetensors", build("bounds"))
    found = again.predict(rows("classification", seed=5)[0][0]).probs
    assert torch.equal(found, torch.load(path / "expected.pt"))


def test_another_process_loads_it(fork_server, tmp_path):
    tuned = tuned_of("bounds")
    tuned.save(tmp_path / "tuned.safetensors")
    torch.save(tuned.predict(rows("classification", seed=5)[0][0]).probs, tmp_path / "expected.pt")
    assert fork_server.run(load_and_compare, str(tmp_path)) == 0
