"""A fit killed on its way goes on from its checkpoint, and ends as if nothing had happened."""

import os
import re
import signal

import numpy as np
import pytest
import torch
from torch import nn

from estimators import FineTune, LastLayerLaplace, LinearResponse, MeanAbsolute, PosteriorDraws, RegVar
from estimators.errors import ModelChangedError, StateError, UnsupportedError
from estimators.estimator.cloning import clone
from estimators.persistence import checkpoint
from estimators.runtime.rng import preserved_random_state
from estimators.training import Recipe

SGD = Recipe(epochs=2, batch_size=7, optimizer="sgd", lr="auto")
FITS = {
    "sgd": {"regularizer": PosteriorDraws(3, rao_blackwell=None), "solver": FineTune(recipe=SGD)},
    "draws": {"regularizer": PosteriorDraws(3, variance_estimate="monte_carlo"), "solver": LinearResponse(1e-9)},
    "bounds": {"regularizer": PosteriorDraws(3, variance_estimate="bounds"), "solver": LinearResponse()},
    "mean absolute": {"regularizer": MeanAbsolute(), "solver": LinearResponse(1e-9)},
}
RESUMED = ["draws", "bounds", "mean absolute"]


def estimator(name, *, seed=2, **options):
    with preserved_random_state():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    return RegVar(model, "classification", **{"prior_precision": 2.0, **FITS[name], **options})


def rows(seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(23, 4, generator=generator, dtype=torch.float64)
    return list(zip(x.split(9), torch.randint(0, 3, (23,), generator=generator).split(9), strict=True))


def killed_after(n_writes):
    """Write at every chance, and die after the n-th write."""
    written, write = [], checkpoint.write_file

    def writing(*args):
        write(*args)
        written.append(args)
        if len(written) == n_writes:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint._SECONDS, checkpoint.write_file = 0.0, writing


def fit_and_die(name, path, n_writes):
    """Run by a process of its own."""
    killed_after(n_writes)
    estimator(name).fit(rows(), checkpoint=path)


@pytest.fixture
def fit_killed(fork_server):
    """fit_killed(name, path, n): a fit in another process, which is killed after its n-th write."""

    def run(name, path, n_writes):
        assert fork_server.run(fit_and_die, name, str(path), n_writes) == -signal.SIGKILL

    return run


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(checkpoint, "_SECONDS", 0.0)


@pytest.mark.filterwarnings("ignore::estimators.errors.NotConvergedWarning")
@pytest.mark.parametrize("name", RESUMED)
def test_a_killed_fit_resumes_with_the_same_result(name, fit_killed, tmp_path):
    path = tmp_path / "fit.safetensors"
    fit_killed(name, path, 2)
    with pytest.raises(StateError, match=r"finished fit.*checkpoint="):
        estimator(name).load(path)
    resumed = estimator(name).fit(rows(), checkpoint=path)
    undisturbed = estimator(name).fit(rows())
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert torch.allclose(resumed.variance(x), undisturbed.variance(x), rtol=1e-9, atol=1e-13)
    passes = [dict(report.passes) for report in (resumed.fit_report_, undisturbed.fit_report_)]
    for found in passes:
        found.pop("self-check")  # the process that resumes compares its own derivatives
    assert passes[0] == pytest.approx(passes[1])


def test_a_resumed_fit_does_not_start_again(fit_killed, tmp_path, monkeypatch):
    path = tmp_path / "fit.safetensors"
    fit_killed("bounds", path, 2)
    written, write = [], checkpoint.write_file
    monkeypatch.setattr(checkpoint, "write_file", lambda *args: (written.append(args), write(*args)))
    resumed = estimator("bounds").fit(rows(), checkpoint=path)
    assert len(written) == resumed.fit_report_.solver.iterations - 2


@pytest.mark.filterwarnings("ignore::estimators.errors.NotConvergedWarning")
@pytest.mark.parametrize("name", ["sgd", "bounds"])
def test_the_same_call_loads_a_finished_fit(name, tmp_path, monkeypatch):
    path, x = tmp_path / "fit.safetensors", rows()[0][0]
    fitted = estimator(name).fit(rows(), checkpoint=path)
    monkeypatch.setattr(RegVar, "_fit", None)
    again = estimator(name).fit(rows(), checkpoint=path)
    assert torch.equal(again.variance(x), fitted.variance(x))
    assert torch.equal(estimator(name).load(path).variance(x), fitted.variance(x))


@pytest.mark.filterwarnings("ignore::estimators.errors.NotConvergedWarning")
def test_fine_tune_writes_no_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_file", None)
    estimator("sgd").fit(rows(), checkpoint=tmp_path / "fit.safetensors")
    assert (tmp_path / "fit.safetensors").exists()  # the finished fit


def test_a_checkpoint_of_another_fit_is_rejected_and_kept(fit_killed, tmp_path):
    path = tmp_path / "fit.safetensors"
    fit_killed("draws", path, 2)
    before = path.read_bytes()
    for other, error, says in (
        (estimator("draws", prior_precision=3.0), StateError, "prior_precision"),
        (estimator("bounds"), StateError, "solver"),
        (estimator("draws", seed=3), ModelChangedError, "weights"),
    ):
        with pytest.raises(error, match=says):
            other.fit(rows(), checkpoint=path)
    with pytest.raises(StateError, match="training rows"):
        estimator("draws").fit(rows(seed=2), checkpoint=path)
    with pytest.raises(StateError, match="order of the fit"):
        estimator("draws").fit(rows()[::-1], checkpoint=path)
    path.write_bytes(before[:-40])
    with pytest.raises(StateError):
        estimator("draws").fit(rows(), checkpoint=path)


def test_estimators_with_little_to_lose_write_the_fit_itself(tmp_path):
    path, model = tmp_path / "fit.safetensors", estimator("sgd").model
    fitted = LastLayerLaplace(model, "classification", prior_precision=2.0).fit(rows(), checkpoint=path)
    loaded = LastLayerLaplace(model, "classification", prior_precision=2.0).load(path)
    assert torch.equal(loaded.variance(rows()[0][0]), fitted.variance(rows()[0][0]))


def test_an_estimator_that_cannot_be_saved_says_so_before_it_fits(tmp_path):
    class Unsaved(LastLayerLaplace):
        _get_fit_state = RegVar.__mro__[1]._get_fit_state

        def _fit(self, objective, *, progress_bar):  # noqa: ARG002
            raise AssertionError

    with pytest.raises(UnsupportedError, match="can be saved"):
        Unsaved(estimator("sgd").model, "classification").fit(rows(), checkpoint=tmp_path / "fit")


def test_writes_are_some_time_apart(tmp_path, monkeypatch):
    path = tmp_path / "fit.safetensors"
    monkeypatch.setattr(checkpoint, "_SECONDS", 1e6)
    monkeypatch.setattr(checkpoint, "write_file", None)
    estimator("bounds").fit(rows(), checkpoint=path)
    assert path.exists()


@pytest.mark.parametrize(
    ("name", "part", "changes"),
    [
        ("draws", "regularizer", {"seed": 1, "n_draws": 4, "variance_estimate": "auto", "rao_blackwell": None}),
        ("draws", "solver", {"tol": 1e-8, "max_iter": 999, "basis_dtype": torch.float16}),
    ],
)
def test_a_fit_on_its_way_is_not_gone_on_with_under_any_other_option(name, part, changes, fit_killed, tmp_path):
    path = tmp_path / "fit.safetensors"
    fit_killed(name, path, 2)
    for option, value in changes.items():
        other = clone(estimator(name), {f"{part}.{option}": value})
        with pytest.raises(StateError, match=re.escape(f"{part}.{option}")):
            other.fit(rows(), checkpoint=path)


@pytest.mark.filterwarnings("ignore::estimators.errors.NotConvergedWarning")
def test_an_unfinished_fit_resumes_under_equal_options_of_other_types(fit_killed, tmp_path):
    path = tmp_path / "fit.safetensors"
    fit_killed("draws", path, 2)
    solver = LinearResponse(np.float64(1e-9))
    options = {"prior_precision": torch.tensor(2), "prior_mean": 0, "subset_of_weights": "all", "solver": solver}
    resumed = estimator("draws", **options).fit(rows(), checkpoint=path)
    undisturbed = estimator("draws").fit(rows())
    x = rows()[0][0]
    assert torch.allclose(resumed.variance(x), undisturbed.variance(x), rtol=1e-9, atol=1e-13)
