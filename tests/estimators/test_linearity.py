"""λ: how far the network is from its linearization, and a descent that goes on at a smaller one."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from estimators import FineTune, Gaussian, PosteriorDraws, RegVar, checkpoint
from estimators.errors import NotConvergedWarning
from estimators.regvar.solvers import linearity
from estimators.regvar.solvers.linearity import auto_lam, nonlinearity, straighter_lam
from estimators.rng import preserved_random_state
from estimators.team import Team
from estimators.training import Recipe

DELTA = 0.6


class Square(nn.Module):
    """f = x (w + w²), so that J = x (1 + 2 w), and the departure at a step s is x s²."""

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
        regularizer=PosteriorDraws(3, exact_block=None),
        solver=FineTune(lam=1e-3, recipe=Recipe(epochs=1, lr=1e-4, optimizer="sgd")),
    )
    return fitted, list(zip(x.split(4), y.split(4), strict=True))


@pytest.fixture
def objective():
    fitted, rows = square()
    with pytest.warns(NotConvergedWarning):
        return fitted.fit(rows).refit_objective_


@pytest.mark.parametrize("lam", [0.5, 1e-2])
def test_the_departure_of_a_square_by_hand(objective, lam):
    steps = torch.tensor([[2.0], [-3.0]], dtype=torch.float64)
    slope = 1 + 2 * 0.25  # ‖λ²(4, 9)‖ / ‖λ · 1.5 · (2, 3)‖
    expected = lam * math.hypot(4, 9) / (slope * math.hypot(2, 3))
    assert nonlinearity(objective, steps, lam) == pytest.approx(expected)


def test_lam_stays_where_it_is_straight_and_else_comes_to_where_it_is(objective):
    steps = torch.tensor([[2.0], [-3.0]], dtype=torch.float64)
    assert straighter_lam(objective, steps, 1e-2) == 1e-2
    lower = straighter_lam(objective, steps, 0.5)
    assert nonlinearity(objective, steps, lower) == pytest.approx(linearity._STRAIGHT)
    assert straighter_lam(objective, steps * math.nan, 1e-2) == pytest.approx(1e-5)
    assert straighter_lam(objective, steps * math.inf, 1e-2) == pytest.approx(1e-5)


def weakly_held(dtype=torch.float32):
    """A network that its few rows and a weak prior hold so loosely that draws bend it."""
    with preserved_random_state():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).to(dtype).eval()
        x = torch.randn(60, 3).to(dtype)
    return model, list(zip(x.split(16), torch.sin(2 * x[:, :2]).split(16), strict=True)), x


def draws(model, rows, *, lam="auto", in_flight="auto", **options):
    solver = FineTune(
        lam, recipe=Recipe(epochs=16, batch_size=16, optimizer="nesterov", lr="auto"), in_flight=in_flight
    )
    regularizer = PosteriorDraws(5, exact_block=None, readout="draws")
    parts = {"prior_precision": 0.01, "regularizer": regularizer, "solver": solver}
    return RegVar(model, Gaussian(0.3), **parts).fit(rows, **options)


@pytest.mark.filterwarnings("ignore::estimators.errors.NotConvergedWarning")
def test_refits_that_bend_the_network_go_on_at_a_smaller_lam():
    model, rows, x = weakly_held()
    free = draws(model, rows)
    objective = free.refit_objective_
    first = auto_lam(objective, free.regularizer.pose(objective)[0])
    held = draws(model, rows, lam=first)
    assert held.fit_report_.solver.lam == first
    assert held.fit_report_.solver.nonlinearity > 0.2
    assert free.fit_report_.solver.lam < 0.7 * first
    assert free.fit_report_.solver.nonlinearity < 0.6 * held.fit_report_.solver.nonlinearity
    nearly_none = draws(model, rows, lam=first / 20).variance(x)
    of_free, of_held = ((f.variance(x) - nearly_none).norm() / nearly_none.norm() for f in (free, held))
    assert of_free < 0.6 * of_held


@pytest.mark.filterwarnings("ignore::estimators.errors.NotConvergedWarning")
def test_a_fit_that_stopped_goes_on_at_the_lam_it_had_come_to(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_SECONDS", 0.0)
    model, rows, x = weakly_held()
    whole = draws(model, rows, in_flight=2)
    written, write = [], checkpoint.write_file

    def writing(*args):
        write(*args)
        written.append(args)
        if len(written) == 17:  # after the first epoch of the second of three flights
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_file", writing)
    with pytest.raises(KeyboardInterrupt):
        draws(model, rows, in_flight=2, checkpoint=tmp_path / "fit.safetensors")
    resumed = draws(model, rows, in_flight=2, checkpoint=tmp_path / "fit.safetensors")
    assert resumed.fit_report_.solver.lam == whole.fit_report_.solver.lam
    assert torch.equal(resumed.variance(x), whole.variance(x))


@pytest.mark.filterwarnings("ignore::estimators.errors.NotConvergedWarning")
def test_lam_stays_where_round_off_is_what_departs():
    model, rows, _ = weakly_held()
    with torch.no_grad():
        model[2].bias += 3e3
    fitted = draws(model, [(x, y + 3e3) for x, y in rows])
    assert fitted.fit_report_.solver.lam > 5e-4
    assert fitted.fit_report_.solver.nonlinearity < 0.5


@pytest.mark.filterwarnings("ignore::estimators.errors.NotConvergedWarning")
def test_the_departure_reported_is_the_largest_of_the_flights():
    model, rows, _ = weakly_held()
    fitted = draws(model, rows, in_flight=4)  # four, and one
    objective, report = fitted.refit_objective_, fitted.fit_report_.solver
    ends = fitted.readout_.displacement
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


def test_processes_that_share_the_draws_agree_on_the_departure_of_all(objective):
    steps = torch.tensor([[2.0], [-3.0]], dtype=torch.float64)
    x = next(iter(objective.batches)).x
    of_first = [x.norm().square() * (0.5**2 * 4) ** 2, x.norm().square() * (0.5 * 1.5 * 2) ** 2]
    team = Team(1, 2, Other(*of_first), "draws")
    alone = nonlinearity(objective, steps, 0.5)
    assert nonlinearity(replace(objective, team=team), steps[1:], 0.5) == pytest.approx(alone)
