"""SGLD, SGHMC and cyclical SGHMC: moments of a Gaussian posterior with the bias of the step size, and their steps."""

import numpy as np
import pytest
import torch
from torch import nn

from estimators import Gaussian
from estimators.errors import ConvergenceError, OptionError, StateError
from estimators.objective.recorded_gradients import BatchGradients
from estimators.persistence import checkpoint
from estimators.sampling import SGHMC, SGLD, CyclicalSGHMC
from estimators.sampling.sgmcmc import ChainState, sgmcmc_step, stochastic_gradient
from estimators.training.epoch_sizes import EpochSizes
from estimators.training.recipe import Recipe
from estimators.training.training import epoch

SIGMA, DELTA, PRIOR_MEAN = 0.6, 2.5, 0.2
SHORT = {"n_samples": 4, "thinning": 3, "n_chains": 2, "batch_size": 7}
CYCLES = {"n_cycles": 2, "cycle_steps": 12, "n_samples": 3, "n_chains": 2, "batch_size": 7}
SAMPLERS = {
    "sgld": (SGLD, {"burn_in": 5, **SHORT}),
    "sghmc": (SGHMC, {"burn_in": 5, **SHORT}),
    "cyclical": (CyclicalSGHMC, CYCLES),
}
every = pytest.mark.parametrize("name", SAMPLERS)


def build(name, problem, **changed):
    kind, options = SAMPLERS[name]
    common = {"prior_precision": DELTA, "prior_mean": PRIOR_MEAN}
    return kind(problem.model, problem.likelihood, **{**common, **options, **changed})


def stationary_variance(step_size, friction, a):
    """The variance of θ at curvature a, from the covariance equation C = M C Mᵀ + noise of the step that is in use."""

    def moved(theta, velocity):
        state = ChainState.start(torch.tensor([theta]).double(), 1, seed=0)
        state.velocity += velocity
        gradient = a * state.theta
        sgmcmc_step(state, gradient, step_size=step_size, friction=friction, temperature=0.0)
        return [float(state.theta), float(state.velocity)]

    m = np.array([moved(1.0, 0.0), moved(0.0, 1.0)]).T
    noise = 2 * friction * step_size * np.ones((2, 2))  # the same z moves θ and v
    covariance = np.linalg.solve(np.eye(4) - np.kron(m, m), noise.flatten()).reshape(2, 2)
    return covariance[0, 0]


@pytest.mark.parametrize("friction", [1.0, 0.4, 0.1])
def test_the_bias_of_the_variance_is_of_first_order_in_the_step_size(friction):
    a = 3.0
    errors = [stationary_variance(eta, friction, a) * a - 1 for eta in (0.1, 0.05, 0.025)]
    for eta, error in zip((0.1, 0.05, 0.025), errors, strict=True):
        assert 1 + error == pytest.approx(1 / (1 - eta * a / (2 * (2 - friction))), rel=1e-9)
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.05)


def test_the_noise_of_a_step_has_the_variance_of_the_covariance_equation():
    state = ChainState.start(torch.zeros(20_000).double(), 1, seed=3)
    sgmcmc_step(state, torch.zeros(1, 20_000).double(), step_size=0.07, friction=0.3, temperature=0.5)
    assert float(state.theta.var()) == pytest.approx(2 * 0.3 * 0.07 * 0.5, rel=5 * (2 / 20_000) ** 0.5)
    assert torch.equal(state.theta, state.velocity)


class Linear:
    """The posterior N(mean, A⁻¹) of f = Wx + b by dense algebra; each output has the block `a`."""

    def __init__(self, problem):
        x = torch.cat([problem.x, torch.ones(len(problem.x), 1).double()], 1)
        self.a = x.T @ x / SIGMA**2 + DELTA * torch.eye(5).double()
        self.mean = torch.linalg.solve(self.a, x.T @ problem.y / SIGMA**2 + DELTA * PRIOR_MEAN).T  # (2, 5)

    @staticmethod
    def by_output(samples):
        """Weights (S, 10) as (S, 2, 5)."""
        return torch.cat([samples[:, :8].unflatten(1, (2, 4)), samples[:, 8:, None]], 2)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(SGLD, {"step": 0.6}), (SGHMC, {"step": 0.8, "friction": 0.3}), (SGHMC, {"step_size": 2e-3, "friction": 0.5})],
)
def test_a_gaussian_posterior_has_its_moments_and_the_bias_of_the_step(kind, options, make_problem):
    """500 chains in full batches: the variances are known to 3 %."""
    problem = make_problem("regression", nn.Linear(4, 2))
    exact, chains = Linear(problem), 500
    common = {"prior_precision": DELTA, "prior_mean": PRIOR_MEAN, "batch_size": 20, "seed": 1}
    lengths = {"n_chains": chains, "burn_in": 150, "n_samples": 4, "thinning": 40}
    fitted = kind(problem.model, Gaussian(SIGMA), **common, **lengths, **options).fit(problem.loader)
    assert fitted.weight_samples_.shape == (4 * chains, 10)
    values, vectors = torch.linalg.eigh(exact.a)
    along = (exact.by_output(fitted.weight_samples_) - exact.mean) @ vectors * values.sqrt()  # N(0, 1 + bias)
    biased = [stationary_variance(fitted.step_size_, fitted._friction, float(a)) * float(a) for a in values]
    found = along.square().mean((0, 1))
    error = 5 * (2 / (2 * 4 * chains)) ** 0.5
    assert torch.allclose(found, torch.tensor(biased, dtype=torch.float64), rtol=error)
    assert float(along.mean((0, 1)).abs().max()) < 5 * max(biased) ** 0.5 / (2 * 4 * chains) ** 0.5
    if "step" in options:  # the automatic size is a fraction of 1/λ_max, and its bias is seen
        assert fitted.step_size_ * float(values[-1]) == pytest.approx(options["step"], rel=0.02)
        assert biased[-1] > 1 + 2 * error


@pytest.mark.parametrize("size", [7, 10])  # batches of 7, 7 and 6 rows; of 10 and 10
def test_the_mean_gradient_of_an_epoch_is_that_of_the_objective(size, make_problem):
    problem = make_problem("classification")
    objective = build("sgld", problem).fit(problem.loader).objective_
    thetas = objective.theta + 0.3 * torch.randn(3, 43, generator=torch.Generator().manual_seed(2)).double()
    gradients, recipe = BatchGradients(objective), Recipe(batch_size=size)
    n_batches = EpochSizes.of(objective.batches, recipe).n_batches
    assert n_batches == -(-20 // size)
    batches = epoch(objective.batches, recipe, torch.Generator().manual_seed(4), even=True)
    total = sum(stochastic_gradient(gradients, thetas, batch, n_batches) for batch in batches)
    expected = torch.stack([objective.gradient(theta) for theta in thetas])
    assert torch.allclose(total / n_batches, expected, rtol=1e-9)


@pytest.mark.parametrize(("kind", "friction"), [(SGLD, {}), (SGHMC, {"friction": 0.3})])
def test_rows_of_a_short_batch_weigh_as_much_as_others(kind, friction):
    """Batches of 19 rows and of one outlier, in the order of the loader; one weight per output."""
    x, y = torch.ones(20, 1).double(), torch.zeros(20, 2).double()
    y[19] = torch.tensor([10.0, -6.0])
    precision = 20 / SIGMA**2 + DELTA
    mean = (y.sum(0) / SIGMA**2 + DELTA * PRIOR_MEAN) / precision
    model = nn.Linear(1, 2, bias=False).double().eval()
    options = {"batch_size": None, "burn_in": 200, "n_samples": 20, "thinning": 11, "n_chains": 100, **friction}
    sampler = kind(model, Gaussian(SIGMA), prior_precision=DELTA, prior_mean=PRIOR_MEAN, **options)
    samples = sampler.fit([(x[:19], y[:19]), (x[19:], y[19:])]).weight_samples_
    assert torch.allclose(samples.mean(0), mean, atol=0.4 * precision**-0.5)
    assert torch.allclose(samples.var(0) * precision, torch.ones(2).double(), rtol=0.2)


def test_rows_are_regrouped_into_batches_of_nearly_equal_size(make_problem):
    """With a last batch of one row, a third of the steps would have no curvature, and the chains would diverge."""
    problem = make_problem("regression", nn.Linear(4, 2), n=129)
    exact = Linear(problem)
    options = {"n_cycles": 4, "cycle_steps": 150, "n_chains": 50, "batch_size": 64}
    fitted = build("cyclical", problem, **options).fit(problem.loader)
    batches = epoch(fitted.objective_.batches, Recipe(batch_size=64), torch.Generator(), even=True)
    assert [len(batch) for batch in batches] == [43, 43, 43]
    deviations = exact.by_output(fitted.weight_samples_) - exact.mean
    assert float((deviations @ exact.a * deviations).sum(-1).mean()) < 3 * 5  # 5, of which minibatches add some


def test_the_automatic_step_size_is_for_the_largest_batch():
    """Of K batches with equal rows, the curvature of one of B rows is KB/N times that of all rows."""
    x, y = torch.ones(20, 1).double(), torch.zeros(20, 1).double()
    model, options = nn.Linear(1, 1, bias=False).double().eval(), {**SHORT, "batch_size": None, "burn_in": 1}

    def step_size(*sizes):
        loader = list(zip(x.split(sizes), y.split(sizes), strict=True))
        return SGHMC(model, Gaussian(SIGMA), prior_precision=1e-9, **options).fit(loader).step_size_

    assert step_size(19, 1) == pytest.approx(step_size(20) / 1.9)
    assert step_size(10, 10) == pytest.approx(step_size(20))


@every
def test_chains_start_at_the_model_and_samples_are_kept_at_equal_distances(name, make_problem):
    problem = make_problem("classification")
    fitted = build(name, problem, step_size=1e-30).fit(problem.loader)  # nothing moves
    assert torch.allclose(fitted.weight_samples_, fitted.theta_.expand_as(fitted.weight_samples_), rtol=1e-9)
    kept = [step for step in range(1, fitted._n_steps + 1) if fitted._is_kept(step)]
    assert kept == {"cyclical": [8, 10, 12, 20, 22, 24]}.get(name, [8, 11, 14, 17])
    assert len(fitted.weight_samples_) == 2 * len(kept)


@every
def test_members_are_the_network_at_the_kept_weights(name, make_problem):
    problem = make_problem("classification")
    fitted = build(name, problem, subset_of_weights=["2.*"]).fit(problem.loader)
    assert fitted.weight_samples_.shape[1] == 18
    for theta, f in zip(fitted.weight_samples_, fitted.member_outputs(problem.query), strict=True):
        state = fitted.weights_to_state_dict(theta)
        by_module = torch.func.functional_call(problem.model, state, (problem.query,))
        assert torch.allclose(by_module, f, rtol=1e-10)


def test_a_cycle_explores_without_noise_and_then_samples(make_problem):
    problem = make_problem("classification")
    sampler = build("cyclical", problem, exploration=0.5)
    factors = [sampler._step_factor(step) for step in range(24)]
    assert factors[:12] == factors[12:]
    assert factors[0] == 1.0
    assert factors[6] == pytest.approx(0.5)
    assert factors == pytest.approx([0.5 * (np.cos(np.pi * (step % 12) / 12) + 1) for step in range(24)])
    assert [sampler._temperature(step) for step in range(12)] == [0.0] * 6 + [1.0] * 6


def test_a_cycle_may_keep_every_step_of_sampling(make_problem):
    """(1 − 0.32) · 75 = 51, which is 50.999… in floating point; 10 · 0.1 steps are one, and 1 − 0.9 is 0.0999…"""
    problem = make_problem("classification")
    for exploration, n_samples, cycle_steps in ((0.32, 51, 75), (0.9, 1, 10)):
        options = {"exploration": exploration, "n_samples": n_samples, "cycle_steps": cycle_steps, "n_cycles": 2}
        sampler = build("cyclical", problem, **options)
        kept = [step for step in range(1, 2 * cycle_steps + 1) if sampler._is_kept(step)]
        of_a_cycle = list(range(cycle_steps - n_samples + 1, cycle_steps + 1))
        assert kept == of_a_cycle + [cycle_steps + step for step in of_a_cycle]
    with pytest.raises(OptionError, match="cycle_steps"):
        build("cyclical", problem, exploration=0.32, n_samples=52, cycle_steps=75)


def test_a_single_sample_has_no_variance(make_problem):
    problem = make_problem("classification")
    single = {"n_cycles": 1, "n_samples": 1, "n_chains": 1}
    with pytest.raises(OptionError, match="at least 2 samples"):
        build("cyclical", problem, **single)
    for name in single:
        fitted = build("cyclical", problem, **{**single, name: 2}).fit(problem.loader)
        assert fitted.variance(problem.query).isfinite().all()


def test_samples_of_a_chain_are_together(make_problem):
    problem = make_problem("classification")
    fitted = build("sghmc", problem, n_samples=3, thinning=1, n_chains=4).fit(problem.loader)
    chains = fitted.weight_samples_.unflatten(0, (4, 3))
    within = (chains[:, 1:] - chains[:, :-1]).norm(dim=-1).mean()
    between = (chains[1:] - chains[:-1]).norm(dim=-1).mean()
    assert float(within) < 0.7 * float(between)


class Killed(Exception):
    pass


@every
def test_an_interrupted_fit_continues_where_it_was(name, make_problem, tmp_path, monkeypatch):
    problem, path, written = make_problem("classification"), tmp_path / "fit.safetensors", []
    monkeypatch.setattr(checkpoint, "_SECONDS", 0.0)
    write = checkpoint.write_file

    def dying(*arguments):
        write(*arguments)
        written.append(arguments)
        if len(written) == 4:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_file", dying)
        with pytest.raises(Killed):
            build(name, problem).fit(problem.loader, checkpoint=path)
    with pytest.raises(StateError, match="finished fit"):
        build(name, problem).load(path)
    resumed, undisturbed = build(name, problem), build(name, problem).fit(problem.loader)
    monkeypatch.setattr(checkpoint, "write_file", lambda *a: (written.append(a), write(*a)))
    resumed.fit(problem.loader, checkpoint=path)
    assert torch.allclose(resumed.weight_samples_, undisturbed.weight_samples_, rtol=1e-9)
    assert len(written) == -(-undisturbed._n_steps // 3)  # one per epoch of 3 steps, and none twice
    assert torch.equal(build(name, problem).load(path).variance(problem.query), resumed.variance(problem.query))


def test_a_checkpoint_of_rows_in_another_order_is_rejected(make_problem, tmp_path, monkeypatch):
    problem, path = make_problem("classification"), tmp_path / "fit.safetensors"
    monkeypatch.setattr(checkpoint, "_SECONDS", 0.0)
    write = checkpoint.write_file

    def dying(*arguments):
        write(*arguments)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_file", dying)
        with pytest.raises(Killed):
            build("sgld", problem).fit(problem.loader, checkpoint=path)
    with pytest.raises(StateError, match="another order"):
        build("sgld", problem).fit(problem.loader[::-1], checkpoint=path)


@every
def test_a_chain_that_diverges_is_an_error(name, make_problem):
    problem = make_problem("regression", nn.Linear(4, 2))
    with pytest.raises(ConvergenceError, match=r"step_size=.*smaller step_size"):
        build(name, problem, step_size=1e200).fit(problem.loader)


@every
def test_bad_options_are_rejected(name, make_problem):
    problem = make_problem("classification")
    wrong = {"step_size": 0.0, "step": -1.0, "n_chains": 0, "batch_size": 0, "n_samples": 0, "seed": 0.5}
    wrong |= {"friction": 1.5, "n_cycles": 0, "cycle_steps": 5, "exploration": 1.0} if name == "cyclical" else {}
    wrong |= {} if name == "cyclical" else {"burn_in": -1, "thinning": 0}
    wrong |= {"friction": 0.0} if name == "sghmc" else {}
    for option, value in wrong.items():
        with pytest.raises(OptionError, match=option):
            build(name, problem, **{option: value})
    with pytest.raises(OptionError, match='step_size="auto"'):
        build(name, problem, step=0.3, step_size=0.1)
