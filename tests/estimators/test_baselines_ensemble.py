"""The deep ensemble against copies trained by hand."""

import copy

import pytest
import torch
from torch import nn

from estimators.baselines import DeepEnsemble
from estimators.errors import ModelError, OptionError
from estimators.runtime.rng import member_seeds, seeded_random_state
from estimators.training import Recipe, train_map

SHORT = Recipe(epochs=5, batch_size=7, lr=0.03)


def make():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()


def ensemble(problem, **changed):
    options = {"make_model": make, "recipe": SHORT, "n_members": 3, "seed": 4, "prior_precision": problem.delta}
    return DeepEnsemble(problem.model, problem.likelihood, **{**options, **changed})


def test_an_ensemble_is_the_model_and_copies_trained_by_hand(make_problem):
    problem = make_problem("classification", make())
    networks = [copy.deepcopy(problem.model)]
    for seed in member_seeds(4, 2):
        with seeded_random_state(seed):
            model = make()
        train_map(model, "classification", problem.loader, prior_precision=2.5, recipe=SHORT, seed=seed)
        networks.append(model)
    assert not torch.equal(
        networks[1][1].running_mean, networks[2][1].running_mean
    )  # they keep statistics of their own
    with torch.no_grad():
        outputs = torch.stack([model(problem.query) for model in networks])
    fitted = ensemble(problem).fit(problem.loader)
    assert torch.allclose(fitted.member_outputs(problem.query), outputs, rtol=1e-9)
    assert torch.allclose(fitted.variance(problem.query), torch.var(outputs, dim=0), rtol=1e-9)
    assert torch.allclose(fitted.predict(problem.query).mean, torch.mean(outputs, dim=0), rtol=1e-9)


def test_a_larger_ensemble_begins_with_the_same_members_and_another_seed_has_others(make_problem):
    problem = make_problem("classification", make())
    small, large, other = (
        ensemble(problem, **changed).fit(problem.loader).member_outputs(problem.query)
        for changed in ({"n_members": 2}, {"n_members": 4}, {"n_members": 2, "seed": 5})
    )
    assert torch.equal(large[:2], small)
    assert torch.equal(other[0], small[0])  # the model itself
    assert not torch.allclose(other[1], small[1], atol=1e-2)
    assert len({float(f[0, 0]) for f in large}) == 4


def test_neighbouring_seeds_share_no_member():
    seeds = [seed for start in range(50) for seed in member_seeds(start, 20)]
    assert len(set(seeds)) == 1000


def test_a_make_model_that_cannot_be_is_rejected(make_problem):
    problem = make_problem("classification", make())
    made = make()
    cases = {
        r"architecture.*'0\.bias' of shape \(5,\).*\(6,\); 7 tensors": lambda: nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)
        ).double(),
        r"'1\.bias' of shape \(5,\).*'1\.bias' absent": lambda: nn.Sequential(
            nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)
        ).double(),
        "builds a new network": lambda: problem.model,
        "weights in use": lambda: made,  # the second member would go on from the first
    }
    for message, bad in cases.items():
        with pytest.raises(ModelError, match=message):
            ensemble(problem, make_model=bad).fit(problem.loader)
    with pytest.raises(OptionError, match=r"n_members >= 2.*1"):
        ensemble(problem, n_members=1)


def test_a_model_in_use_is_not_trained_on(make_problem, untouched):
    problem = make_problem("classification", make())
    with untouched(problem.model), pytest.raises(ModelError):
        ensemble(problem, make_model=lambda: problem.model).fit(problem.loader)
