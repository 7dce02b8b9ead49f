"""λ: how far slopes and outputs are from their linearization, and SGD refits that select λ again."""

import math
from dataclasses import replace

import pytest
import torch
from estimators.regvar.solvers.fine_tuning import conjugate_gradients as conjugate_refits
from estimators.regvar.solvers.fine_tuning import nonlinearity as linearity
from estimators.regvar.solvers.fine_tuning import sgd
from estimators.regvar.solvers.fine_tuning.nonlinearity import auto_lam, nonlinearity, select_lam
from torch import nn

from estimators import FineTune, Gaussian, LinearResponse, PosteriorDraws, RegVar
from estimators.data.distributed import ProcessGroup
from estimators.errors import NotConvergedWarning
from estimators.persistence import checkpoint
from estimators.regvar.perturbation import LinearPerturbation
from estimators.runtime.rng import preserved_random_state
from estimators.training import Recipe

DELTA = 0.6


class Square(nn.Module):
    """f = x (w + w²), so that J = x (1 + 2 w), and the nonlinearity ratio at a step s is x s²."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([w], dtype=torch.float64))

    def forward(self, x):
        return x * (self.w + self.w.square())


def square(w=0.25):
    x = torch.linspace(-1, 1, 11, dtype=torch.float64)[:, None]
    y = x * (w + w**2)
    fitted = RegVar(
        Square(w),
        Gaussian(0.5),
        prior_precision=DELTA,
        regularizer=PosteriorDraws(3, rao_blackwell=None),
        solver=FineTune(lam=1e-3, recipe=Recipe(epochs=1, lr=1e-4, optimizer="sgd")),
    )
    return fitted, list(zip(x.split(4), y.split(4), strict=True))


@pytest.fixture
def objective():
    fitted, rows = square()
    with pytest.warns(NotConvergedWarning):
        return fitted.fit(rows).refit_objective_


@pytest.mark.parametrize("lam", [0.5, 1e-2])
def test_the_nonlinearity_of_a_square_by_hand(objective, lam):
    steps = torch.tensor([[2.0], [-3.0]], dtype=torch.float64)
    slope = 1 + 2 * 0.25  # ‖λ²(4, 9)‖ / ‖λ · 1.5 · (2, 3)‖
    expected = lam * math.hypot(4, 9) / (slope * math.hypot(2, 3))
    assert nonlinearity(objective, steps, lam) == pytest.approx(expected)


def test_the_nonlinearity_of_gradients_of_a_square_by_hand(objective):
    """f = x g(w), g = w + w², self-targets: ∇L = Σx² (g(w) − ĝ) g′(w) / σ², less its linear part."""
    perturbation, d, lam = (
        LinearPerturbation.along(torch.ones(1, 1).double(), objective.theta),
        torch.tensor([[2.0]]).double(),
        0.3,
    )
    probe = linearity._Probe.of(objective, perturbation, d)
    slope, step = 1 + 2 * 0.25, lam * 2.0
    squares = sum(float(batch.x.square().sum()) for batch in objective.batches) / 0.5**2
    nonlinear_part = squares * (slope * step + step**2) * (slope + 2 * step) / lam
    assert probe.distance(lam) == pytest.approx((nonlinear_part - squares * slope**2 * 2.0) ** 2)


def distance(objective, at):
    """‖∇F(D) − (A D − ∇r)‖ by λ, written a second time, for all rows and no perturbation."""
    limit = objective.product(at)

    def measured(lam):
        return float((objective.gradient(objective.theta + lam * at[0]) / lam - limit[0]).norm())

    return measured


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_lam_minimises_the_error_of_gradients_from_nonlinearity_and_round_off(dtype):
    model, rows, _ = weakly_held(dtype)
    fitted = RegVar(
        model,
        Gaussian(0.3),
        prior_precision=0.01,
        regularizer=PosteriorDraws(2, rao_blackwell=None, variance_estimate="monte_carlo"),
        solver=LinearResponse(),
    ).fit(rows)
    # The fit goes on in float64 where float32 has too much round-off; λ is chosen here in the dtype of the network.
    objective = fitted.objective_.centred(curvature="ggn")
    assert objective.theta.dtype == dtype
    perturbation, _ = fitted.regularizer.build_problem(objective)
    measured = distance(objective, perturbation.initial_guess[:1])
    lam = auto_lam(objective, perturbation)
    assert lam == select_lam(objective, perturbation, perturbation.initial_guess[:1])
    lower = lam / 10 if dtype == torch.float32 else lam / 2  # the smallest is tried first there
    assert measured(lam) < min(measured(lam * 10), measured(lower) if dtype == torch.float32 else math.inf)
    assert measured(lam) < 1e-3 * measured(0.1)
    if dtype == torch.float32:
        grid = [10 ** (-6 + k / 8) for k in range(41)]
        assert measured(lam) < 2.5 * min(map(measured, grid))


def test_linear_networks_have_the_largest_lam_or_one_as_good():
    model = nn.Linear(3, 2).eval()
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    rows = [(x, x[:, :2])]
    fitted = RegVar(model, Gaussian(0.3), solver=LinearResponse(), regularizer=PosteriorDraws(2, rao_blackwell=None))
    objective = fitted.fit(rows).refit_objective_
    perturbation, _ = fitted.regularizer.build_problem(objective)
    assert auto_lam(objective, perturbation) > 1e-3


def test_without_a_first_guess_it_is_the_steepest_descent_that_is_tried(objective):
    perturbation = LinearPerturbation.along(torch.full((1, 1), 40.0).double(), objective.theta)
    probe = linearity._Probe.of(objective, perturbation, None)
    exact = torch.linalg.solve(objective.product(torch.eye(1).double()), perturbation.gradient.T).T
    assert torch.allclose(probe.at, exact)  # one parameter: the least of the parabola
    assert float(probe.limit.abs().max()) < 1e-9


@pytest.mark.parametrize(
    ("values", "least"), [((2.0, 0.0, 2.0), 0.0), ((1.0, 0.0, 3.0), -0.25), ((math.inf, 0.0, 1.0), 0.0), ((2, 1, 0), 0)]
)
def test_the_minimum_of_a_parabola_through_three_values(values, least):
    assert linearity._parabola_minimum(*values) == pytest.approx(least)


def weakly_held(dtype=torch.float32):
    """A network that its few rows and a weak prior determine so loosely that it is nonlinear between draws."""
    with preserved_random_state():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).to(dtype).eval()
        x = torch.randn(60, 3).to(dtype)
    return model, list(zip(x.split(16), torch.sin(2 * x[:, :2]).split(16), strict=True)), x


def draws(model, rows, *, lam="auto", max_concurrent="auto", **options):
    solver = FineTune(
        lam, recipe=Recipe(epochs=16, batch_size=16, optimizer="nesterov", lr="auto"), max_concurrent=max_concurrent
    )
    regularizer = PosteriorDraws(5, rao_blackwell=None, variance_estimate="monte_carlo")
    parts = {"prior_precision": 0.01, "regularizer": regularizer, "solver": solver}
    return RegVar(model, Gaussian(0.3), **parts).fit(rows, **options)


@pytest.mark.filterwarnings("ignore::estimators.errors.NotConvergedWarning")
def test_refits_look_for_lam_again_from_where_they_have_come_to(monkeypatch):
    model, rows, _ = weakly_held()
    looked, look = [], linearity.select_lam

    def looking(objective, perturbation, at=None):
        looked.append(None if at is None else at.clone())
        return look(objective, perturbation, at)

    for module in (linearity, sgd, conjugate_refits):
        monkeypatch.setattr(module, "select_lam", looking)
    free = draws(model, rows)
    assert [at is None for at in looked] == [True, False, False]
    assert not torch.equal(looked[1], looked[2])
    assert free.fit_report_.solver.lam == look(free.refit_objective_, first_of(free), looked[2])
    looked.clear()
    held = draws(model, rows, lam=1e-3)
    assert held.fit_report_.solver.lam == 1e-3
    assert not looked


def first_of(fitted):
    return fitted.regularizer.build_problem(fitted.refit_objective_)[0].select(slice(0, 1))


@pytest.mark.filterwarnings("ignore::estimators.errors.NotConvergedWarning")
def test_a_fit_that_stopped_goes_on_at_the_lam_it_had_come_to(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_SECONDS", 0.0)
    model, rows, x = weakly_held()
    whole = draws(model, rows, max_concurrent=2)
    written, write = [], checkpoint.write_file

    def writing(*args):
        write(*args)
        written.append(args)
        if len(written) == 17:  # after the first epoch of the second of three sample batches
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_file", writing)
    with pytest.raises(KeyboardInterrupt):
        draws(model, rows, max_concurrent=2, checkpoint=tmp_path / "fit.safetensors")
    resumed = draws(model, rows, max_concurrent=2, checkpoint=tmp_path / "fit.safetensors")
    assert resumed.fit_report_.solver.lam == whole.fit_report_.solver.lam
    assert torch.equal(resumed.variance(x), whole.variance(x))


@pytest.mark.filterwarnings("ignore::estimators.errors.NotConvergedWarning")
def test_more_round_off_takes_a_larger_lam():
    model, rows, _ = weakly_held()
    before = draws(model, rows).fit_report_.solver.lam
    with torch.no_grad():
        model[2].bias += 3e3
    fitted = draws(model, [(x, y + 3e3) for x, y in rows])
    assert fitted.fit_report_.solver.lam > 5 * before
    assert fitted.fit_report_.solver.nonlinearity < 0.5


@pytest.mark.filterwarnings("ignore::estimators.errors.NotConvergedWarning")
def test_the_reported_nonlinearity_is_the_largest_of_the_sample_batches():
    model, rows, _ = weakly_held()
    fitted = draws(model, rows, max_concurrent=4)  # four, and one
    objective, report = fitted.refit_objective_, fitted.fit_report_.solver
    ends = fitted.variance_estimate_.displacement
    at_the_last = [nonlinearity(objective, part, report.lam) for part in ends.split(4)]
    assert report.nonlinearity >= (1 - 1e-5) * max(at_the_last)  # the first flew at that λ or a larger one


class Other:
    """The engine of a second process, which adds what the first one has measured."""

    num_processes, process_index = 2, 1

    def __init__(self, *measured):
        self.measured = list(measured)

    def reduce(self, mine, reduction):
        assert reduction == "sum"
        return mine + self.measured.pop(0)


def test_processes_that_share_the_draws_agree_on_the_nonlinearity_of_all(objective):
    steps = torch.tensor([[2.0], [-3.0]], dtype=torch.float64)
    x = next(iter(objective.batches)).x
    of_first = [x.norm().square() * (0.5**2 * 4) ** 2, x.norm().square() * (0.5 * 1.5 * 2) ** 2]
    process_group = ProcessGroup(1, 2, Other(*of_first), "draws")
    alone = nonlinearity(objective, steps, 0.5)
    assert nonlinearity(replace(objective, process_group=process_group), steps[1:], 0.5) == pytest.approx(alone)
