"""A fit as plain data: saved whole, loaded into the same options and the same model only, and the same afterwards."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from estimators import (
    FineTune,
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
    SignedProbes,
    UncertaintyEstimator,
)
from estimators.baselines.map import MAP
from estimators.errors import ModelChangedError, NotFittedError, StateError, UnsupportedError

COMMON = {"prior_precision": {"*bias": 0.7, "*": 1.9}, "prior_mean": 0.1}
RESPONSE = LinearResponse()

ESTIMATORS = {
    "map": (MAP, {}),
    "cholesky": (LinearizedLaplace, {"inverse": "cholesky"}),
    "hessian": (LinearizedLaplace, {"curvature": "hessian", "inverse": "cholesky", "prior_precision": 300.0}),
    "dual": (LinearizedLaplace, {"inverse": "dual"}),
    "kron": (LinearizedLaplace, {"hessian_structure": "kron", "prior_precision": 1.9}),
    "ekfac": (LinearizedLaplace, {"hessian_structure": "ekfac", "prior_precision": {"1.*": 0.4, "*": 1.9}}),
    "diag": (LinearizedLaplace, {"hessian_structure": "diag"}),
    "last layer full": (LastLayerLaplace, {}),
    "last layer kron": (LastLayerLaplace, {"hessian_structure": "kron", "prior_precision": 1.9}),
    "last layer diag": (LastLayerLaplace, {"hessian_structure": "diag"}),
    "draws": (RegVar, {"regularizer": PosteriorDraws(5), "solver": RESPONSE}),
    "fine tune": (RegVar, {"regularizer": PosteriorDraws(3), "solver": FineTune()}),
    "plain draws": (RegVar, {"regularizer": PosteriorDraws(5, rao_blackwell=None), "solver": RESPONSE}),
    "bounds": (
        RegVar,
        {"regularizer": PosteriorDraws(3, variance_estimate="bounds"), "solver": LinearResponse(max_iter=2)},
    ),
    "parameter probes": (RegVar, {"regularizer": ParameterProbes(5), "solver": NewtonRefit()}),
    "mean absolute": (RegVar, {"regularizer": MeanAbsolute(), "solver": RESPONSE}),
}
NEEDS_DATA = {
    "cg": (LinearizedLaplace, {"inverse": "cg"}),
    "pointwise": (RegVar, {"regularizer": Pointwise(), "solver": RESPONSE}),
    "signed probes": (RegVar, {"regularizer": SignedProbes(5), "solver": RESPONSE}),
}
EVERY = {**ESTIMATORS, **NEEDS_DATA}


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double().eval()


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(23, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(23, 2, generator=generator, dtype=torch.float64)
    return [(x[:9], y[:9]), (x[9:], y[9:])]


QUERIES = data(1)[0][0]


def build(name, model=None, **changed):
    kind, options = EVERY[name]
    return kind(model or network(), Gaussian(0.6), **{**COMMON, **options, **changed})


def answers(estimator):
    found = [estimator.variance(QUERIES)]
    for method in ("covariance", "standard_error"):
        try:
            found.append(getattr(estimator, method)(QUERIES))
        except (UnsupportedError, AttributeError):
            found.append(torch.zeros(1))
    try:
        found.append(estimator.sample(QUERIES, 2, seed=4))
    except UnsupportedError:
        found.append(torch.zeros(1))
    return found


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_loaded_fit_answers_as_the_one_that_was_saved(name, tmp_path):
    fitted = build(name).fit(data())
    fitted.save(tmp_path / "fit.safetensors")
    loaded = build(name).load(tmp_path / "fit.safetensors")
    assert loaded.n_data_ == 23
    for attribute in [a for a in vars(fitted) if a in ("inverse_", "jacobian_backend_", "fit_report_")]:
        assert getattr(fitted, attribute) == getattr(loaded, attribute)  # queries will add to the reports of both
    for before, after in zip(answers(fitted), answers(loaded), strict=True):
        assert torch.allclose(before, after, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", NEEDS_DATA)
def test_what_solves_at_query_time_asks_for_its_data_and_goes_on_with_them(name):
    fitted = build(name).fit(data())
    loaded = build(name).load_state_dict(fitted.state_dict())
    with pytest.raises(NotFittedError, match="attach_data"):
        loaded.variance(QUERIES)
    one_batch = [tuple(torch.cat(parts).flip(0) for parts in zip(*data(), strict=True))]  # another order and size
    loaded.attach_data(one_batch)
    assert torch.allclose(loaded.variance(QUERIES), fitted.variance(QUERIES), rtol=1e-7)


@pytest.mark.parametrize("name", ["cholesky", "last layer full"])
def test_the_evidence_of_a_loaded_fit_needs_the_data(name):
    fitted = build(name).fit(data())
    loaded = build(name).load_state_dict(fitted.state_dict())
    with pytest.raises(NotFittedError, match="attach_data"):
        loaded.log_marginal_likelihood()
    for delta in (None, 3.3):
        evidence = fitted.log_marginal_likelihood(delta)
        assert torch.allclose(loaded.attach_data(data()).log_marginal_likelihood(delta), evidence)


def test_a_fit_is_not_loaded_into_another_function_of_the_same_weights(tmp_path):
    def made(activation):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 2)).double().eval()
        return LinearizedLaplace(model, Gaussian(0.6), prior_precision=1.9)

    x = torch.randn(7, 3, dtype=torch.float64)
    fitted = made(nn.Tanh()).fit([(x, x[:, :2])])
    fitted.save(tmp_path / "fit")
    assert torch.equal(made(nn.Tanh()).load(tmp_path / "fit").variance(x), fitted.variance(x))
    with pytest.raises(ModelChangedError, match="layers, weights or buffers"):
        made(nn.Sigmoid()).load(tmp_path / "fit")


def test_other_data_are_rejected():
    loaded = build("cg").load_state_dict(build("cg").fit(data()).state_dict())
    changed = [(x, 1.01 * y) for x, y in data()]
    with pytest.raises(StateError, match="other inputs or targets"):
        loaded.attach_data(changed)
    with pytest.raises(StateError, match="9 rows"):
        loaded.attach_data(data()[:1])


def test_another_model_is_rejected_also_in_a_buffer():
    state = build("bounds").fit(data()).state_dict()
    for change in (lambda m: m[0].weight.data.mul_(1 + 1e-12), lambda m: m[1].running_mean.add_(1e-9)):
        model = network()
        change(model)
        with pytest.raises(ModelChangedError, match="weights or buffers"):
            build("bounds", model).load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("cholesky", {"prior_precision": 2.0}, "prior_precision"),
        ("cholesky", {"inverse": "cg"}, "inverse"),
        ("cholesky", {"subset_of_weights": "0.*"}, "subset_of_weights"),
        ("draws", {"regularizer": PosteriorDraws(6)}, "n_draws=5"),
    ],
)
def test_other_options_are_rejected_by_name(name, changed, message):
    state = build(name).fit(data()).state_dict()
    with pytest.raises(StateError, match=message):
        build(name, **changed).load_state_dict(state)


@pytest.mark.parametrize("has_it", ["file", "estimator"])
def test_an_option_that_only_one_side_has_is_rejected_by_name(has_it):
    state = build("cholesky").fit(data()).state_dict()
    about = json.loads(state["about"])
    if has_it == "file":
        about["options"]["damping"] = 0.5
    else:
        del about["options"]["inverse"]
    with pytest.raises(StateError, match="damping" if has_it == "file" else "inverse"):
        build("cholesky").load_state_dict({**state, "about": json.dumps(about)})


def test_a_state_of_another_estimator_or_none_at_all_is_rejected(tmp_path):
    with pytest.raises(StateError, match="of LastLayerLaplace"):
        build("last layer full").load_state_dict(build("map").fit(data()).state_dict())
    for state in ({}, {"about": "{}"}, {"about": "[]"}, {"about": json.dumps({"format": 99})}):
        with pytest.raises(StateError, match="format 2"):
            build("map").load_state_dict(state)
    (tmp_path / "other").write_bytes(b"not a file of this kind")
    with pytest.raises(StateError, match="safetensors"):
        build("map").load(tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        build("map").load(tmp_path / "nothing")


def test_a_failed_load_leaves_the_estimator_as_it_was():
    estimator = build("cholesky").fit(data())
    before = estimator.variance(QUERIES)
    with pytest.raises(StateError):
        estimator.load_state_dict(build("map").fit(data()).state_dict())
    assert torch.equal(estimator.variance(QUERIES), before)


def test_the_file_is_plain_tensors_without_the_model(tmp_path):
    estimator = build("draws").fit(data())
    estimator.save(tmp_path / "fit.safetensors")
    with safe_open(tmp_path / "fit.safetensors", framework="pt") as file:
        names = set(file.keys())
        about = json.loads(file.metadata()["about"])
    assert names == {"displacement", "block"}
    assert about["parameters"] == [n for n, _ in network().named_parameters()]
    assert about["n_data"] == 23


def test_an_unfitted_estimator_has_no_state():
    with pytest.raises(NotFittedError):
        build("cholesky").state_dict()


def test_a_model_changed_since_the_fit_is_not_saved():
    estimator = build("cholesky").fit(data())
    estimator.model[0].weight.data.add_(1)
    with pytest.raises(ModelChangedError):
        estimator.state_dict()


def test_an_estimator_without_its_own_part_says_that_it_cannot_be_saved():
    class Other(UncertaintyEstimator):
        def _fit(self, objective, *, progress_bar):  # noqa: ARG002
            self.learned_ = 1.0

        def _variance(self, x):
            return torch.ones(len(x), 2, dtype=x.dtype)

    with pytest.raises(UnsupportedError, match="_get_fit_state and _set_fit_state"):
        Other(network(), Gaussian(0.6)).fit(data()).state_dict()


def test_a_write_that_is_cut_short_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "fit.safetensors"
    build("map").fit(data()).save(path)
    old = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        build("draws").fit(data()).save(path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["fit.safetensors"]


def load_and_compare(directory):
    """Run by a process of its own."""
    path = Path(directory)
    found = build("bounds").load(path / "fit.safetensors").variance(QUERIES)
    assert torch.allclose(found, torch.load(path / "expected.pt"))


def test_another_process_loads_it(fork_server, tmp_path):
    estimator = build("bounds").fit(data())
    estimator.save(tmp_path / "fit.safetensors")
    torch.save(estimator.variance(QUERIES), tmp_path / "expected.pt")
    assert fork_server.run(load_and_compare, str(tmp_path)) == 0


def test_states_of_equal_fits_are_equal_and_copies_of_the_estimator_keep_theirs():
    first, second = (build("draws").fit(data()).state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first if key != "about")
    assert first["about"] == second["about"]
    assert copy.deepcopy(build("draws").fit(data())).state_dict()["about"] == first["about"]
