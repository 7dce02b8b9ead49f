"""The diagnosis: each finding against a number derived otherwise, and each thing that can be wrong, found."""

import copy
import json
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from estimators import Bernoulli, Categorical, Gaussian, LastLayerLaplace, LinearizedLaplace, LinearResponse, RegVar
from estimators.diagnostics import CHECKS, QUICK, diagnose, prior_precision_of
from estimators.errors import OptionError, UnsupportedError
from estimators.precision.sizes import dense_bytes, dual_bytes, streamed_bytes
from estimators.row_digests import row_digests


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
    assert "not looked at" in diagnosis["the rest"].measured


def test_rows_that_depend_on_each_other_are_an_error(make_problem):
    problem = make_problem(model=Centred())
    assert looked_at(problem, "forward")["independence of rows"].level == "error"


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
        (lambda problem: problem.model[0].float(), "weights"),
        (lambda problem: problem.x.view(-1)[3:4].fill_(float("inf")), "training data"),
        (lambda problem: problem.y.fill_(7), "training data"),
    ],
    ids=["NaN", "two dtypes", "Inf in x", "labels beyond the classes"],
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


def test_overlaps_are_counted_by_rows_whatever_their_order_label_and_batch(make_problem):
    problem = make_problem()
    rows = torch.cat([problem.x[[7, 2, 2]], problem.query])
    labels = torch.zeros(10, dtype=torch.long)
    held_out = list(zip(rows.split(4), labels.split(4), strict=True))
    new = [(problem.query + 1, labels[:7])]
    diagnosis = looked_at(problem, "overlap", validation=new, test=held_out)
    assert diagnosis["train/test overlap"].values == {"shared": 3, "rows": 10}
    assert diagnosis["train/test overlap"].level == "error"
    assert diagnosis["train/validation overlap"].level == diagnosis["validation/test overlap"].level == "ok"


def test_repeated_training_rows_are_counted(make_problem):
    problem = make_problem()
    problem.x[4] = problem.x[11]
    problem.x[5] = problem.x[11]
    assert looked_at(problem, "overlap")["repeated rows"].values["repeated"] == 2


def test_a_digest_is_of_one_row_over_all_tensors_of_a_pytree():
    x = {"a": torch.arange(6.0).view(3, 2), "b": torch.arange(3), "scalar": torch.ones(1)}
    digests = row_digests(x)
    assert len(set(digests)) == 3
    changed = {**x, "b": torch.tensor([0, 1, 5])}
    assert [a == b for a, b in zip(digests, row_digests(changed), strict=True)] == [True, True, False]


def mean_losses():
    """(likelihood, the mean loss that is usual for it, targets of (20, 3) outputs, how many labels)."""
    generator = torch.Generator().manual_seed(5)
    classes = torch.randint(0, 3, (20,), generator=generator)
    values = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    return {
        "classification": (Categorical(), F.cross_entropy, classes),
        "regression": (Gaussian(0.7), F.mse_loss, values),
        "binary": (Bernoulli(), F.binary_cross_entropy_with_logits, (values > 0).double()),
    }


@pytest.mark.parametrize("kind", ["classification", "regression", "binary"])
def test_the_prior_precision_of_a_weight_decay_gives_a_multiple_of_the_loss_that_was_trained(kind):
    """∇(mean loss) + wd·θ must be ∇L(θ) times a constant, for every θ."""
    likelihood, mean_loss, y = mean_losses()[kind]
    decay, generator = 0.03, torch.Generator().manual_seed(6)
    x = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    delta = prior_precision_of(decay, likelihood, n_data=20, n_outputs=3)
    ratios = []
    for _ in range(2):
        weight = torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_()
        f = x @ weight
        trained = torch.autograd.grad(mean_loss(f, y) + 0.5 * decay * weight.square().sum(), weight, retain_graph=True)
        ours = torch.autograd.grad(likelihood.nll(f, y).sum() + 0.5 * delta * weight.square().sum(), weight)
        ratios.append(ours[0] / trained[0])
    ratios = torch.stack(ratios)
    assert torch.allclose(ratios, ratios.mean().expand_as(ratios), rtol=1e-8)


def test_several_labels_a_row_count_each():
    assert prior_precision_of(0.1, Categorical(), n_data=20, n_outputs=15, n_labels=55) == pytest.approx(5.5)


def test_noises_that_differ_have_no_prior_precision_of_a_plain_mean():
    with pytest.raises(UnsupportedError, match="sigma_noise"):
        prior_precision_of(0.1, Gaussian(torch.tensor([0.5, 0.6])), n_data=20, n_outputs=2)


@pytest.mark.parametrize(("decay", "level", "ratio"), [(0.125, "ok", 1), (0.1, "note", 1.25), (0.5, "warning", 4)])
def test_a_weight_decay_is_compared_with_the_prior(make_problem, decay, level, ratio):
    finding = looked_at(make_problem(), "decay", weight_decay=decay)["weight decay"]  # δ = 2.5, N = 20
    assert finding.level == level
    assert finding.values["ratio"] == pytest.approx(ratio)


def test_groups_of_an_optimizer_are_compared_each_with_its_own_prior(make_problem):
    problem = make_problem()
    weights, biases = ([p for n, p in problem.model.named_parameters() if n.endswith(end)] for end in ("ght", "ias"))
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    right = looked_at(problem, "decay", weight_decay=optimizer, prior_precision={"*bias": 0.0, "*": 2.0})
    assert right["weight decay"].level == "ok"
    assert looked_at(problem, "decay", weight_decay=optimizer)["weight decay"].values["ratio"] == float("inf")


def test_adamw_has_no_prior_precision(make_problem):
    problem = make_problem()
    optimizer = torch.optim.AdamW(problem.model.parameters(), weight_decay=0.1)
    finding = looked_at(problem, "decay", weight_decay=optimizer)["weight decay"]
    assert finding.values["decoupled"]
    adam = torch.optim.Adam(problem.model.parameters(), weight_decay=0.125)
    assert looked_at(problem, "decay", weight_decay=adam)["weight decay"].level == "ok"


def test_classes_and_losses_are_counted_on_every_set(make_problem):
    problem = make_problem()
    problem.y[problem.y == 2] = 0
    with torch.no_grad():
        f, query = problem.model(problem.x), problem.model(problem.query)
    labels = query.argmax(-1)
    diagnosis = looked_at(problem, "targets", test=[(problem.query, labels)])
    counts = np.bincount(problem.y.numpy(), minlength=3)
    values = diagnosis["class balance"].values
    assert (values["least"], values["most"], values["absent"]) == (0, counts.max(), 1)
    assert diagnosis["class balance"].level == "warning"
    nll = float(F.cross_entropy(f, problem.y))
    shares = counts[counts > 0] / 20
    values = diagnosis["training loss"].values
    assert values["nll"] == pytest.approx(nll)
    assert values["nll_of_constant"] == pytest.approx(float(-(shares * np.log(shares)).sum()), rel=1e-6)
    assert diagnosis["accuracy"].values["test"] == 1.0
    assert diagnosis["accuracy"].values["train"] == pytest.approx(float((f.argmax(-1) == problem.y).double().mean()))


def test_a_network_that_explains_nothing_is_a_warning(make_problem):
    problem = make_problem("regression")
    problem.y += 50
    assert looked_at(problem, "targets")["training loss"].level == "warning"


def test_a_noise_far_from_the_residuals_is_a_warning_with_the_one_that_is_near(make_problem):
    problem = make_problem("regression", n=400)
    noise = looked_at(problem, "targets")["noise"]
    with torch.no_grad():
        rmse = (problem.model(problem.x) - problem.y).square().mean(0).sqrt()
    assert noise.values["rmse_train"] == pytest.approx(rmse.tolist())
    assert noise.level == "warning"  # σ = 0.6, residuals of 1
    problem.likelihood = Gaussian(1.0)
    assert looked_at(problem, "targets")["noise"].level == "ok"


def test_predictions_of_many_places_a_row_are_judged_at_those_that_are_kept(make_problem):
    model = nn.Sequential(nn.Linear(4, 15), nn.Unflatten(1, (5, 3)))
    problem = make_problem("regression", model)
    problem.likelihood = Categorical()
    problem.y = torch.randint(0, 3, (20, 5), generator=torch.Generator().manual_seed(2))
    problem.y[:, 3:] = -100
    diagnosis = looked_at(problem, "targets", "decay", weight_decay=0.1)
    with torch.no_grad():
        f = model(problem.x)[:, :3].flatten(0, 1)
    assert diagnosis["training loss"].values["nll"] == pytest.approx(
        float(F.cross_entropy(f, problem.y[:, :3].flatten()))
    )
    assert diagnosis["weight decay"].values["factor"] == 60


FITS = {
    "LastLayerLaplace()": (LastLayerLaplace, 1.5),
    'LinearizedLaplace(inverse="cholesky")': (partial(LinearizedLaplace, inverse="cholesky"), 1.5),
    'LinearizedLaplace(inverse="dual")': (partial(LinearizedLaplace, inverse="dual"), 1.5),
    'LinearizedLaplace(hessian_structure="kron")': (partial(LinearizedLaplace, hessian_structure="kron"), 1.5),
    'LinearizedLaplace(hessian_structure="ekfac")': (partial(LinearizedLaplace, hessian_structure="ekfac"), 1.5),
    'LinearizedLaplace(hessian_structure="diag")': (partial(LinearizedLaplace, hessian_structure="diag"), 1.5),
    "RegVar(solver=LinearResponse())": (partial(RegVar, solver=LinearResponse()), 2),
    "RegVar(solver=FineTune())": (RegVar, 4),  # it stops where the draws have converged
}


@pytest.mark.parametrize("name", FITS)
def test_a_cost_has_about_the_passes_that_the_ledger_counts(make_problem, name):
    problem = make_problem(n=120)
    costs = {cost.estimator: cost for cost in looked_at(problem, "cost").costs}
    make, factor = FITS[name]
    fitted = make(problem.model, problem.likelihood, prior_precision=problem.delta).fit(problem.loader)
    counted = fitted.network_.ledger.cost / 120
    assert counted / factor <= costs[name].passes <= counted * factor


def test_the_memory_of_the_exact_forms_is_what_the_forms_themselves_refuse_by(make_problem):
    problem = make_problem()
    objective = LinearizedLaplace(problem.model, problem.likelihood).fit(problem.loader).objective_
    costs = {cost.estimator: cost.bytes_needed for cost in looked_at(problem, "cost").costs}
    for inverse, needed in (("cholesky", dense_bytes), ("dual", dual_bytes), ("streamed", streamed_bytes)):
        assert costs[f'LinearizedLaplace(inverse="{inverse}")'] == needed(objective)


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


def test_a_check_that_does_not_exist_is_refused(make_problem):
    with pytest.raises(OptionError, match="curvature"):
        looked_at(make_problem(), "curvature")
