"""The nonlinearity ratio of displaced weights, and the λ that FineTune selects by it."""

import math

import pytest
import torch
from torch import nn

from estimators import FineTune, Gaussian, LinearResponse, PosteriorDraws, RegVar
from estimators.errors import LambdaTooLargeError
from estimators.regvar.perturbation import LinearPerturbation
from estimators.regvar.solvers.nonlinearity import nonlinearity, select_lam
from estimators.runtime.rng import preserved_random_state

DELTA = 0.6


class Square(nn.Module):
    """f = x (w + w²), so that J = x (1 + 2 w), and f − Jᵀs at a step s is x s²."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([w], dtype=torch.float64))

    def forward(self, x):
        return x * (self.w + self.w.square())


@pytest.fixture
def objective():
    x = torch.linspace(-1, 1, 11, dtype=torch.float64)[:, None]
    loader = list(zip(x.split(4), (x * 0.25).split(4), strict=True))
    regularizer = PosteriorDraws(3, rao_blackwell=None)
    regvar = RegVar(
        Square(0.25), Gaussian(0.5), prior_precision=DELTA, regularizer=regularizer, solver=LinearResponse()
    )
    return regvar.fit(loader).refit_objective_


def expected_ratio(lam, *steps):
    """‖λ² (s₁², s₂², …)‖ / ‖λ · 1.5 · (s₁, s₂, …)‖."""
    return lam * math.hypot(*(step**2 for step in steps)) / (1.5 * math.hypot(*steps))


@pytest.mark.parametrize("lam", [0.5, 1e-2])
def test_the_ratio_of_a_square_by_hand(objective, lam):
    steps = torch.tensor([[2.0], [-3.0]], dtype=torch.float64)
    assert nonlinearity(objective, steps, lam) == pytest.approx(expected_ratio(lam, 2.0, 3.0))


@pytest.mark.parametrize("guessed", [True, False])
@pytest.mark.parametrize("step", [0.05, 1.0, 30.0])
def test_lam_is_the_largest_that_is_nearly_linear_at_the_start(objective, step, guessed):
    steps = torch.tensor([[step], [-2 * step]], dtype=torch.float64)
    if guessed:
        perturbation = LinearPerturbation.along(torch.ones(2, 1).double(), objective.theta, initial_guess=steps)
    else:  # then along ∇r/δ
        perturbation = LinearPerturbation.along(DELTA * steps, objective.theta)
    lam = select_lam(objective, perturbation)
    assert expected_ratio(lam, step, 2 * step) <= 0.01
    assert lam == 0.1 or expected_ratio(2 * lam, step, 2 * step) > 0.01
    assert math.log2(0.1 / lam) == pytest.approx(round(math.log2(0.1 / lam)))


def test_linear_networks_have_the_largest_lam():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    regularizer = PosteriorDraws(2, rao_blackwell=None)
    fitted = RegVar(nn.Linear(3, 2).eval(), Gaussian(0.3), solver=FineTune(), regularizer=regularizer)
    report = fitted.fit([(x, x[:, :2])]).fit_report_
    assert report.solver.lam == 0.1
    assert report.solver.nonlinearity < 1e-3
    assert report.passes["search for lam"] <= 1.01


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_in_float32_lam_is_bounded_by_round_off_too(offset):
    with preserved_random_state():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).eval()
        x = torch.randn(60, 3)
    with torch.no_grad():
        model[2].bias += offset
    regularizer = PosteriorDraws(2, rao_blackwell=None, variance_estimate="monte_carlo")
    options = {"prior_precision": 0.01, "regularizer": regularizer, "solver": LinearResponse()}
    fitted = RegVar(model, Gaussian(0.3), **options).fit([(x, torch.sin(2 * x[:, :2]) + offset)])
    objective = fitted.objective_.centred(curvature="ggn")
    assert objective.theta.dtype == torch.float32
    perturbation, _ = regularizer.build_problem(objective)
    lam = select_lam(objective, perturbation)
    ratios = {
        0.1 / 2**k: nonlinearity(objective, perturbation.initial_guess, 0.1 / 2**k) for k in range(21)
    }  # written a second time
    small = [other for other, ratio in ratios.items() if ratio <= 0.01]
    assert bool(small) == (offset == 0)  # outputs of 10⁶ keep no digits of the displacement
    assert lam == (max(small) if small else min(ratios, key=ratios.get))


class Curved(nn.Module):
    """f = x w₀ + w₁²/25: its curvature counts the more, the less the data allow w₀ to move."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.7, 0.0], dtype=torch.float64))

    def forward(self, x):
        return x * self.w[0] + self.w[1].square() / 25


def refit(sigma, solver):
    """Draws of two weights, one of which the data restrain to about σ and the other not at all."""
    x = torch.linspace(-1, 1, 24, dtype=torch.float64)[torch.randperm(24, generator=torch.Generator().manual_seed(3))]
    loader = list(zip(x[:, None].split(9), (0.7 * x[:, None]).split(9), strict=True))
    regularizer = PosteriorDraws(3, rao_blackwell=None)
    regvar = RegVar(Curved(), Gaussian(sigma), prior_precision=DELTA, regularizer=regularizer, solver=solver)
    return regvar.fit(loader).fit_report_.solver


@pytest.mark.filterwarnings("ignore:the draws have not converged")
@pytest.mark.parametrize(("sigma", "refits"), [(0.3, 1), (0.03, 2), (0.003, 3)])
def test_a_refit_that_ends_outside_the_linear_region_is_done_again_with_a_smaller_lam(sigma, refits):
    report = refit(sigma, FineTune())
    assert report.lam == 0.1 / 8 ** (refits - 1)
    assert report.nonlinearity <= 0.5
    for tried in range(refits - 1):
        with pytest.raises(LambdaTooLargeError, match="smaller lam"):
            refit(sigma, FineTune(0.1 / 8**tried))


@pytest.mark.filterwarnings("ignore:the draws have not converged")
def test_a_refit_that_no_lam_keeps_in_the_linear_region_raises():
    with pytest.raises(LambdaTooLargeError, match=r"at lam=0\.0015625"):
        refit(1e-5, FineTune())
