"""Microcanonical Langevin: its exact partial flows, the order of its error, and the moments of a Gaussian posterior."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from estimators import Gaussian
from estimators.baselines import DeepEnsemble
from estimators.errors import ConvergenceError, ModelError, OptionError, StateError
from estimators.persistence import checkpoint
from estimators.sampling import MicrocanonicalLangevin
from estimators.sampling.microcanonical import FullGradient, Microcanonical
from estimators.training import Recipe

SIGMA, DELTA, PRIOR_MEAN = 0.6, 2.5, 0.2
SHORT = {"warm_up": 60, "n_samples": 4, "thinning": 15, "n_chains": 3}


def build(problem, **changed):
    common = {"prior_precision": DELTA, "prior_mean": PRIOR_MEAN}
    return MicrocanonicalLangevin(problem.model, problem.likelihood, **{**common, **SHORT, **changed})


def chains(k=4, p=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    thetas, noise, gradient = (torch.randn(k, p, generator=generator, dtype=torch.float64) for _ in range(3))
    return Microcanonical.start(thetas, torch.zeros(k).double(), gradient, noise, torch.ones(k).double())


@pytest.mark.parametrize("size", [1e-9, 0.3, 5.0])
def test_the_direction_turns_as_the_differential_equation_says(size):
    """du/dt = (I − u uᵀ)(−∇L)/(P − 1), by the Runge–Kutta method; the kinetic energy changes by ∫ u·∇L dt of it."""
    state = chains()
    gradient, u, n = size * state.gradient, state.direction.clone(), 2000
    time = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    h, gained = time[:, None] / n, torch.zeros(4).double()

    def slope(u):
        pull = -gradient / 5
        return pull - u * (u * pull).sum(1, keepdim=True)

    for _ in range(n):
        k1 = slope(u)
        k2 = slope(u + h / 2 * k1)
        k3 = slope(u + h / 2 * k2)
        k4 = slope(u + h * k3)
        middle = u + h / 2 * k2
        gained -= h[:, 0] * (middle * gradient).sum(1)  # dK/dt = −u·∇L, so that K + L is kept along θ' = u
        u = u + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    kinetic = state.rotate(gradient, time)
    assert torch.allclose(state.direction, u, rtol=1e-6, atol=1e-9)
    assert torch.allclose(kinetic, gained, rtol=1e-3, atol=1e-12)


def test_a_long_turn_does_not_overflow_and_ends_downhill():
    state = chains()
    kinetic = state.rotate(1e6 * state.gradient, torch.ones(4).double())
    downhill = -state.gradient / state.gradient.norm(dim=1, keepdim=True)
    assert torch.allclose(state.direction, downhill, atol=1e-12)
    assert bool(torch.isfinite(kinetic).all())


def test_refreshed_directions_decorrelate_over_the_decoherence_length():
    p = 400
    state = chains(k=2000, p=p)
    state.step_size, state.length = torch.full((2000,), 0.3).double(), torch.full((2000,), 1.7).double()
    before = state.direction.clone()
    state.refresh(torch.randn(2000, p, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    assert torch.allclose(state.direction.norm(dim=1), torch.ones(2000).double(), rtol=1e-12)
    assert float((before * state.direction).sum(1).mean()) == pytest.approx(math.exp(-0.3 / 1.7), abs=0.005)


def test_the_hamiltonian_error_of_a_step_is_of_third_order(make_problem):
    problem = make_problem("classification")
    sampler = build(problem).fit(problem.loader)
    full, errors = FullGradient(sampler.objective_), []
    for epsilon in (0.04, 0.02, 0.01):
        energy, gradient = full(sampler.theta_.expand(4, -1))
        state = Microcanonical.start(
            sampler.theta_.expand(4, -1), energy, gradient, torch.eye(43).double()[:4], torch.ones(4).double()
        )
        half = torch.full((4,), epsilon / 2).double()
        kinetic = state.rotate(gradient, half)
        moved, after = full(state.theta + epsilon * state.direction)
        errors.append((kinetic + state.rotate(after, half) + moved - energy).abs().mean())
    assert float(errors[0] / errors[1]) == pytest.approx(8, rel=0.25)
    assert float(errors[1] / errors[2]) == pytest.approx(8, rel=0.15)


def test_the_full_gradient_is_that_of_the_objective(make_problem):
    problem = make_problem("classification")
    objective = build(problem).fit(problem.loader).objective_
    thetas = objective.theta + 0.3 * torch.randn(3, 43, generator=torch.Generator().manual_seed(2)).double()
    for found in (FullGradient(objective)(thetas), FullGradient(objective, replays=False)(thetas)):
        assert torch.allclose(found[0], torch.stack([objective.loss(theta) for theta in thetas]), rtol=1e-10)
        assert torch.allclose(found[1], torch.stack([objective.gradient(theta) for theta in thetas]), rtol=1e-9)


@pytest.mark.parametrize(("step_size", "bias"), [("auto", 0.1), (0.05, 0.1), (0.4, None)])
def test_a_gaussian_posterior_has_its_moments(step_size, bias, make_problem):
    """In 10 dimensions, 200 chains; with a long step the variances are too large along the stiff directions."""
    problem = make_problem("regression", nn.Linear(4, 2))
    problem.likelihood = Gaussian(SIGMA)
    lengths = {"n_chains": 200, "warm_up": 160, "n_samples": 6, "thinning": 25, "seed": 2}
    fitted = build(problem, step_size=step_size, **lengths).fit(problem.loader)
    x = torch.cat([problem.x, torch.ones(20, 1).double()], 1)
    a = x.T @ x / SIGMA**2 + DELTA * torch.eye(5).double()
    mean = torch.linalg.solve(a, x.T @ problem.y / SIGMA**2 + DELTA * PRIOR_MEAN).T
    values, vectors = torch.linalg.eigh(a)
    w = fitted.weight_samples_
    along = (torch.cat([w[:, :8].unflatten(1, (2, 4)), w[:, 8:, None]], 2) - mean) @ vectors * values.sqrt()
    variance = along.square().mean((0, 1))
    if bias is None:
        assert float(variance[-1]) > 1.2
    else:  # 2,400 values; neighbours in a chain are correlated
        assert float((variance - 1).abs().max()) < bias + 5 * (2 / 1200) ** 0.5 / 2
        assert float(along.mean((0, 1)).abs().max()) < 5 / 1200**0.5


def test_the_warm_up_reaches_the_wanted_hamiltonian_error(make_problem):
    problem = make_problem("classification")
    sampler = build(problem, warm_up=400, n_chains=8)
    errors = []
    adapt = sampler._adapt
    sampler._adapt = lambda state, error, before: (errors.append(error), adapt(state, error, before))
    sampler.fit(problem.loader)
    found = torch.stack(errors[-100:]).square().mean() / 43
    assert 5e-5 < float(found) < 5e-3
    widths = sampler.weight_samples_.unflatten(0, (8, 4)).var(1).sum(1).sqrt()
    ratio = sampler.decoherence_length_ / widths
    assert 0.4 < float(ratio.median()) < 2.5


def test_the_step_size_is_adapted_until_the_end_of_the_warm_up_and_then_kept(make_problem):
    problem = make_problem("classification")
    sampler, sizes = build(problem), []
    step = sampler._step
    sampler._step = lambda state, *rest: (step(state, *rest), sizes.append(state.step_size.clone()))
    sampler.fit(problem.loader)
    changed = [not torch.equal(before, after) for before, after in pairwise(sizes)]
    assert len(sizes) == 60 + 4 * 15
    assert all(changed[:59])
    assert not any(changed[59:])


def fresh():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def test_chains_start_at_the_members_of_an_ensemble(make_problem):
    problem = make_problem("classification")
    training = {"make_model": fresh, "recipe": Recipe(epochs=3, batch_size=7), "seed": 5}
    options = {"step_size": 1e-14, "n_chains": 3, "prior_mean": 0.0}  # the ensemble has no other
    fitted = build(problem, **training, **options).fit(problem.loader)
    ensemble = DeepEnsemble(problem.model, "classification", prior_precision=DELTA, n_members=3, **training)
    ensemble.fit(problem.loader)
    outputs = fitted.member_outputs(problem.query).unflatten(0, (3, 4))
    for i in range(4):  # nothing moves
        assert torch.allclose(outputs[:, i], ensemble.member_outputs(problem.query), rtol=1e-6)
    assert fitted.retrains
    assert fitted.fit_report_.passes["training"] == pytest.approx(6)
    members = [fresh().eval() for _ in range(2)]
    for member, tensors in zip(members, ensemble.members_, strict=True):
        member.load_state_dict(tensors)
    given = build(problem, members=members, **options).fit(problem.loader)
    assert torch.allclose(given.weight_samples_, fitted.weight_samples_, rtol=1e-9)
    assert not given.retrains


def test_networks_at_which_chains_start_are_trained_with_the_prior_mean(make_problem):
    """A linear network has one minimum, which is known."""
    problem = make_problem("regression", nn.Linear(4, 2))
    sigma, mean = problem.likelihood.sigma_noise, torch.tensor([[1.0, -2.0, 0.5, 3.0, -4.0]]).double()
    prior_mean = {"weight": mean[:, :4].expand(2, 4), "bias": mean[0, 4].expand(2)}
    recipe = Recipe(epochs=400, batch_size=20, optimizer="nesterov", lr=0.2)
    training = {"make_model": lambda: nn.Linear(4, 2).double(), "recipe": recipe, "prior_mean": prior_mean}
    fitted = build(problem, step_size=1e-14, n_chains=2, **training).fit(problem.loader)
    x, query = (torch.cat([rows, torch.ones(len(rows), 1).double()], 1) for rows in (problem.x, problem.query))
    precision = x.T @ x / sigma**2 + DELTA * torch.eye(5).double()
    expected = torch.linalg.solve(precision, x.T @ problem.y / sigma**2 + DELTA * mean.T)
    second_chain = fitted.member_outputs(problem.query).unflatten(0, (2, 4))[1]
    assert torch.allclose(second_chain, (query @ expected).expand(4, -1, -1), rtol=1e-4, atol=1e-5)


class Killed(Exception):
    pass


def test_an_interrupted_fit_continues_where_it_was(make_problem, tmp_path, monkeypatch):
    problem, path, written = make_problem("classification"), tmp_path / "fit.safetensors", []
    monkeypatch.setattr(checkpoint, "_SECONDS", 0.0)
    monkeypatch.setattr("estimators.sampling.microcanonical._STEPS_PER_CHECK", 13)
    write = checkpoint.write_file

    def dying(*arguments):
        write(*arguments)
        written.append(arguments)
        if len(written) == 6:  # in sampling, after one sample
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_file", dying)
        with pytest.raises(Killed):
            build(problem).fit(problem.loader, checkpoint=path)
    with pytest.raises(StateError, match="finished fit"):
        build(problem).load(path)
    monkeypatch.setattr(checkpoint, "write_file", lambda *a: (written.append(a), write(*a)))
    resumed = build(problem).fit(problem.loader, checkpoint=path)
    undisturbed = build(problem).fit(problem.loader)
    assert torch.allclose(resumed.weight_samples_, undisturbed.weight_samples_, rtol=1e-6)
    assert torch.allclose(resumed.decoherence_length_, undisturbed.decoherence_length_, rtol=1e-9)
    assert len(written) == 10  # 120 steps in blocks of 13


def test_bad_options_and_divergence_are_errors(make_problem):
    problem = make_problem("classification")
    wrong = {"step_size": 0.0, "n_chains": 0, "warm_up": 1, "n_samples": 1, "thinning": 0, "seed": 0.5}
    for option, value in wrong.items():
        with pytest.raises(OptionError, match=option):
            build(problem, **{option: value})
    with pytest.raises(OptionError, match="members, or make_model and recipe"):
        build(problem, make_model=fresh)
    with pytest.raises(OptionError, match="n_chains=2"):
        build(problem, members=[fresh()])
    with pytest.raises(ConvergenceError, match="step_size"):
        build(problem, step_size=1e200).fit(problem.loader)
    other = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()
    with pytest.raises(ModelError, match="architecture"):
        build(problem, members=[other], n_chains=None).fit(problem.loader)
