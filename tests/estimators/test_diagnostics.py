"""The diagnosis: each finding against a number derived otherwise, and each thing that can be wrong, found."""

import copy
import json
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from estimators import FineTune, LastLayerLaplace, LinearizedLaplace, LinearResponse, RegVar
from estimators.curvature.sizes import dense_bytes, dual_bytes, matrix_free_bytes
from estimators.diagnostics import CHECKS, QUICK, diagnose
from estimators.errors import OptionError
from estimators.models.layer_jacobians import LayerwiseJacobian


def looked_at(problem, *checks, **options):
    options = {"prior_precision": problem.delta, **options}
    return diagnose(problem.model, problem.likelihood, problem.loader, checks=checks or tuple(CHECKS), **options)


@pytest.mark.parametrize("kind", ["regression", "classification", "binary"])
def test_the_gradient_is_that_of_the_loss_written_out(make_problem, by_hand, kind):
    problem = make_problem(kind)
    hand = by_hand(problem)
    theta = hand.theta.clone().requires_grad_()
    loss = hand.minus_log_p(hand.f(theta, problem.x), problem.y) + 0.5 * problem.delta * theta.square().sum()
    gradient = torch.autograd.grad(loss, theta)[0]
    values = looked_at(problem, "gradient")["gradient"].values
    assert values["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-10)
    expected = float(gradient.norm() / (problem.delta * hand.theta).norm())
    assert values["relative_gradient"] == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_the_newton_decrement_is_half_of_g_a_inverse_g(make_problem, by_hand, kind):
    problem = make_problem(kind)
    hand = by_hand(problem)
    theta = hand.theta.clone().requires_grad_()
    loss = hand.minus_log_p(hand.f(theta, problem.x), problem.y) + 0.5 * problem.delta * theta.square().sum()
    gradient = torch.autograd.grad(loss, theta)[0]
    step = torch.linalg.solve(hand.precision("ggn"), gradient)
    values = looked_at(problem, "newton")["distance to the optimum"].values
    assert values["newton_decrement"] == pytest.approx(float(gradient @ step) / 2, rel=1e-3)
    moved = hand.jacobian(problem.loader[0][0]) @ step
    assert values["output_change"] == pytest.approx(float(moved.square().mean().sqrt()), rel=1e-2)
    deviations = (hand.jacobian(problem.query) @ step).abs() / hand.variance(problem.query).sqrt()
    assert float(deviations.max()) <= values["standard_deviations"] * (1 + 1e-6)


def test_at_the_optimum_of_a_linear_regression_no_step_is_left(make_problem):
    problem = make_problem("regression", nn.Sequential(nn.Linear(4, 2)))
    features = torch.cat([problem.x, torch.ones(20, 1).double()], 1)
    solved = torch.linalg.solve(
        features.T @ features / 0.36 + problem.delta * torch.eye(5), features.T @ problem.y / 0.36
    )
    with torch.no_grad():
        problem.model[0].weight.copy_(solved[:4].T)
        problem.model[0].bias.copy_(solved[4])
    diagnosis = looked_at(problem, "gradient", "newton")
    assert diagnosis["gradient"].level == diagnosis["distance to the optimum"].level == "ok"
    assert diagnosis["distance to the optimum"].values["newton_decrement"] < 1e-18


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_the_ends_of_the_spectrum_are_those_of_the_dense_matrices(make_problem, by_hand, kind):
    problem = make_problem(kind)
    hand = by_hand(problem)
    diagnosis = looked_at(problem, "spectrum")
    hessian = torch.linalg.eigvalsh(hand.precision("hessian"))
    smallest = diagnosis["smallest curvature"]
    assert smallest.values["exact"]
    assert smallest.values["smallest"] == pytest.approx(float(hessian[0]), rel=1e-6)
    assert smallest.level == ("ok" if hessian[0] > 0 else "note")
    ggn = float(torch.linalg.eigvalsh(hand.precision("ggn"))[-1])
    assert diagnosis["largest curvature"].values["largest"] == pytest.approx(ggn, rel=1e-8)
    assert diagnosis["largest curvature"].values["stable_rate"] == pytest.approx(2 * 20 / ggn, rel=1e-8)


def test_beyond_400_parameters_the_smallest_eigenvalue_is_bounded_from_above(make_problem, by_hand):
    problem = make_problem("regression", nn.Sequential(nn.Linear(4, 70), nn.Tanh(), nn.Linear(70, 2)), delta=0.3)
    values = looked_at(problem, "spectrum")["smallest curvature"].values
    smallest = float(torch.linalg.eigvalsh(by_hand(problem).precision("hessian"))[0])
    assert not values["exact"]
    assert smallest <= values["smallest"] <= smallest + 0.2 * abs(smallest)


class Functional(nn.Module):
    """Dropout that eval mode does not reach."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x):
        return self.inner(F.dropout(x, 0.3, training=True))


class Centred(nn.Module):
    """Rows less their mean."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x):
        return self.inner(x - x.mean(0))


class Tied(nn.Module):
    """Two layers with one weight, and a parameter that nothing reads."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight
        self.idle = nn.Parameter(torch.ones(5))

    def forward(self, x):
        return self.last(self.second(self.first(x).tanh()).tanh())


def test_dropout_and_batch_statistics_in_train_mode_are_an_error_and_the_rest_is_of_eval_mode(make_problem):
    layers = [nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 3)]
    problem = make_problem(model=nn.Sequential(*layers))
    in_eval = looked_at(problem, "gradient")["gradient"].values
    problem.model.train()
    diagnosis = looked_at(problem, "gradient")
    assert [finding.name for finding in diagnosis.errors] == ["modes"]
    assert diagnosis["modes"].values["in_train_mode"] == 2
    assert diagnosis["gradient"].values == in_eval
    assert problem.model.training


def test_a_random_forward_is_an_error(make_problem):
    diagnosis = looked_at(make_problem(model=Functional()))
    assert diagnosis["determinism"].level == "error"
    assert "not checked" in diagnosis["the rest"].measured


def test_rows_that_depend_on_each_other_are_an_error(make_problem):
    problem = make_problem(model=Centred())
    diagnosis = looked_at(problem, "forward")
    assert diagnosis["independence of rows"].level == "error"
    assert "of a row alone" in diagnosis["independence of rows"].measured
    assert diagnosis["the rest"].measured == "not checked: forward"


def test_tied_frozen_and_idle_parameters_are_counted_and_named(make_problem):
    problem = make_problem(model=Tied())
    problem.model.last.bias.requires_grad_(False)
    diagnosis = looked_at(problem, "forward")
    values = diagnosis["parameters"].values
    assert values["tied"] == [["first.weight", "second.weight"]]
    assert (values["parameters"], values["frozen"], values["chosen"]) == (44, 3, 41)
    assert diagnosis["unused parameters"].values["unused"] == ["idle"]
    assert "5 in 1" in diagnosis["unused parameters"].measured


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (lambda problem: problem.model[0].weight.data.fill_(float("nan")), "weights"),
        (lambda problem: problem.model[0].to("meta"), "weights"),
        (lambda problem: problem.x.view(-1)[3:4].fill_(float("inf")), "training data"),
        (lambda problem: problem.y.fill_(7), "training data"),
    ],
    ids=["NaN", "two devices", "Inf in x", "labels beyond the classes"],
)
def test_what_cannot_be_computed_with_is_an_error_and_nothing_is_raised(make_problem, spoil, name):
    problem = make_problem()
    spoil(problem)
    diagnosis = looked_at(problem)
    assert [finding.name for finding in diagnosis.errors] == [name]
    assert diagnosis["the rest"].level == "note"


def test_a_one_shot_loader_is_an_error(make_problem):
    problem = make_problem()
    diagnosis = diagnose(problem.model, problem.likelihood, iter(problem.loader))
    assert diagnosis.errors


def test_the_model_and_the_random_state_are_left_alone(make_problem, untouched):
    problem = make_problem(model=nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 3)))
    problem.model.train()
    with untouched(problem.model):
        looked_at(problem, validation=problem.loader, weight_decay=0.1)


FITS = {
    "LastLayerLaplace()": (LastLayerLaplace, 1.5),
    'LinearizedLaplace(inverse="cholesky")': (partial(LinearizedLaplace, inverse="cholesky"), 1.5),
    'LinearizedLaplace(inverse="dual")': (partial(LinearizedLaplace, inverse="dual"), 1.5),
    'LinearizedLaplace(hessian_structure="kron")': (partial(LinearizedLaplace, hessian_structure="kron"), 1.5),
    'LinearizedLaplace(hessian_structure="ekfac")': (partial(LinearizedLaplace, hessian_structure="ekfac"), 1.5),
    'LinearizedLaplace(hessian_structure="diag")': (partial(LinearizedLaplace, hessian_structure="diag"), 1.5),
    "RegVar()": (RegVar, 2),
    "RegVar(solver=LinearResponse())": (partial(RegVar, solver=LinearResponse()), 2),
    "RegVar(solver=FineTune())": (partial(RegVar, solver=FineTune()), 1.5),
}


@pytest.mark.parametrize("name", FITS)
def test_a_cost_has_about_the_passes_that_the_ledger_counts(make_problem, name):
    problem = make_problem(n=120)
    costs = {cost.estimator: cost for cost in looked_at(problem, "cost").costs}
    make, factor = FITS[name]
    fitted = make(problem.model, problem.likelihood, prior_precision=problem.delta).fit(problem.loader)
    counted = fitted.network_.pass_counter.cost / 120
    assert counted / factor <= costs[name].passes <= counted * factor


@pytest.mark.parametrize("width", [5, 90])
def test_the_memory_of_the_exact_forms_is_what_the_forms_themselves_reject_by(width, make_problem):
    problem = make_problem(model=nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)))
    objective = LinearizedLaplace(problem.model, problem.likelihood).fit(problem.loader).objective_
    costs = {cost.estimator: cost.bytes_needed for cost in looked_at(problem, "cost").costs}
    layers = LayerwiseJacobian(objective.network, next(iter(objective.batches)).x)
    forms = {"cholesky": dense_bytes(objective), "dual": dual_bytes(objective, layers)}
    for inverse, needed in (forms | {"matrix_free_dual": matrix_free_bytes(objective)}).items():
        assert costs[f'LinearizedLaplace(inverse="{inverse}")'] == needed


def test_forms_that_divide_by_the_prior_are_left_out_where_it_is_0(make_problem):
    diagnosis = looked_at(make_problem(), "cost", prior_precision={"*bias": 0.0, "*": 2.0})
    listed = " ".join(cost.estimator for cost in diagnosis.costs)
    assert "cholesky" in listed
    assert not any(form in listed for form in ("dual", "matrix_free_dual", "lowrank"))


def test_what_does_not_fit_is_said_with_what_does(make_problem, monkeypatch):
    problem = make_problem(model=nn.Sequential(nn.Linear(4, 60), nn.Tanh(), nn.Linear(60, 3)))
    monkeypatch.setattr("estimators.diagnostics.sizes.available_bytes", lambda _: 10**6)
    diagnosis = looked_at(problem, "cost")
    too_large = [cost.estimator for cost in diagnosis.costs if not cost.fits]
    assert 'LinearizedLaplace(inverse="cholesky")' in too_large
    assert diagnosis["cost"].values["too_large"] == too_large
    assert diagnosis["cost"].level == "note"
    assert diagnosis["cost"].values["inverse"] == "cg"


def test_a_diagnosis_is_json_and_text_with_every_finding(make_problem):
    problem = make_problem()
    diagnosis = looked_at(problem, test=problem.loader, weight_decay=0.1)
    content = json.loads(json.dumps(diagnosis.to_dict()))
    assert [finding["name"] for finding in content["findings"]] == [finding.name for finding in diagnosis.findings]
    text = str(diagnosis)
    assert all(finding.name in text for finding in diagnosis.findings)
    assert all(cost.estimator in text for cost in diagnosis.costs)
    assert max(map(len, text.splitlines())) <= 110
    with pytest.raises(KeyError, match="gradient"):
        diagnosis["nothing"]


def test_the_quick_checks_take_a_few_passes(make_problem):
    problem = make_problem()
    calls = []
    model = copy.deepcopy(problem.model)
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    diagnose(model, problem.likelihood, problem.loader, checks=QUICK)
    assert len(calls) <= 10 * len(problem.loader)


def test_a_check_that_does_not_exist_is_rejected(make_problem):
    with pytest.raises(OptionError, match="curvature"):
        looked_at(make_problem(), "curvature")
