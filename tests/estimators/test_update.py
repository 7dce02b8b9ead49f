"""Rows added to a fit, and subnetworks of given weights: against fits on all rows, and dense formulas."""

import pytest
import torch
from torch import nn

from estimators import LastLayerLaplace, LinearizedLaplace, RegVar, tune
from estimators.baselines import MAP
from estimators.curvature import forms
from estimators.errors import (
    CalibrationNotSavedWarning,
    IndefiniteHessianError,
    NotFittedError,
    OptionError,
    UnsupportedError,
)
from estimators.laplace import SubnetworkLaplace, last_layer

DELTA = 2.5
SUMS = {
    "cholesky": lambda p: LinearizedLaplace(p.model, p.likelihood, prior_precision=DELTA, inverse="cholesky"),
    "dual": lambda p: LinearizedLaplace(p.model, p.likelihood, prior_precision=DELTA, inverse="dual"),
    "diag": lambda p: LinearizedLaplace(p.model, p.likelihood, prior_precision=DELTA, hessian_structure="diag"),
    "last-full": lambda p: LastLayerLaplace(p.model, p.likelihood, prior_precision=DELTA),
    "last-diag": lambda p: LastLayerLaplace(p.model, p.likelihood, prior_precision=DELTA, hessian_structure="diag"),
    "factors": lambda p: LinearizedLaplace(p.model, p.likelihood, prior_precision=DELTA, inverse="dual"),
    "subnetwork": lambda p: SubnetworkLaplace(
        p.model, p.likelihood, prior_precision=DELTA, subnetwork_indices=[0, 3, 20, 29]
    ),
}


@pytest.fixture
def problem(make_problem, request):
    wide = "factors" in request.node.name
    model = nn.Sequential(nn.Linear(4, 80), nn.Tanh(), nn.Linear(80, 3)) if wide else None
    return make_problem("classification", model=model)


@pytest.mark.parametrize("name", list(SUMS))
@pytest.mark.parametrize("kept", [True, False])
def test_it_is_the_fit_on_all_rows(problem, name, kept):
    fitted = SUMS[name](problem).fit([(problem.x[:9], problem.y[:9])])
    if not kept:  # loaded from a file, without its rows
        fitted = SUMS[name](problem).load_state_dict(fitted.state_dict())
    assert fitted.update([(problem.x[9:16], problem.y[9:16]), (problem.x[16:], problem.y[16:])]) is fitted
    together = SUMS[name](problem).fit(problem.loader)
    torch.testing.assert_close(fitted.covariance(problem.query), together.covariance(problem.query), rtol=1e-9, atol=0)
    assert fitted.n_data_ == len(problem.x)
    if kept:
        torch.testing.assert_close(fitted.log_marginal_likelihood(), together.log_marginal_likelihood())
    else:
        with pytest.raises(NotFittedError, match="attach_data"):
            fitted.log_marginal_likelihood()
        fitted.attach_data(problem.loader)
    again = SUMS[name](problem).load_state_dict(fitted.state_dict())
    assert torch.equal(again.variance(problem.query), fitted.variance(problem.query))


def test_an_indefinite_hessian_over_all_rows_leaves_the_fit_as_it_was(make_problem):
    problem = make_problem("regression")
    x, f = problem.x, problem.model(problem.x).detach()
    fitted = LinearizedLaplace(problem.model, problem.likelihood, curvature="hessian", prior_precision=3.0)
    fitted.fit([(x[:10], f[:10])])
    matrix, before = fitted.data_curvature_.matrix.clone(), fitted.clone_with(prior_precision=4e3)
    rows = dict(fitted.network_.check.report.rows)
    for _ in range(2):
        with pytest.raises(IndefiniteHessianError):
            fitted.update([(x[10:], f[10:] - 200)])
        assert fitted.n_data_ == fitted.network_.check.n_data == 10
        assert fitted.network_.check.report.rows == rows
        assert torch.equal(fitted.data_curvature_.matrix, matrix)
    after = fitted.clone_with(prior_precision=4e3)
    assert torch.equal(after.variance(problem.query), before.variance(problem.query))
    fitted.update([(x[10:], f[10:])])
    together = fitted.clone_with()
    together.fit([(x[:10], f[:10]), (x[10:], f[10:])])
    torch.testing.assert_close(fitted.variance(problem.query), together.variance(problem.query), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["last-full", "last-diag", "subnetwork"])
def test_an_error_in_the_new_precision_leaves_the_fit_as_it_was(problem, name, monkeypatch):
    fitted = SUMS[name](problem).fit([(problem.x[:9], problem.y[:9])])
    expected = fitted.clone_with(prior_precision=7.0).variance(problem.query)

    def failing(*_, **__):
        raise IndefiniteHessianError(smallest=-1.0, largest=1.0)

    with monkeypatch.context() as patched:
        for module, precision in (
            (last_layer, "FullLastLayer"),
            (last_layer, "DiagLastLayer"),
            (forms, "DensePrecision"),
        ):
            patched.setattr(module, precision, failing)
        with pytest.raises(IndefiniteHessianError):
            fitted.update([(problem.x[9:], problem.y[9:])])
    assert fitted.n_data_ == fitted.network_.check.n_data == 9
    assert torch.equal(fitted.clone_with(prior_precision=7.0).variance(problem.query), expected)


@pytest.mark.parametrize("options", [{"inverse": "cholesky"}, {"inverse": "dual"}, {"hessian_structure": "diag"}])
def test_sampled_labels_of_repeated_inputs_are_those_of_a_fit_on_all_rows(problem, options):
    x, y = torch.cat([problem.x, problem.x[:8], problem.x[:2]]), torch.cat([problem.y, problem.y[:8], problem.y[:2]])
    parts = [list(zip(x[i:j].split(6), y[i:j].split(6), strict=True)) for i, j in ((0, 20), (20, 27), (27, 30))]
    options = {**options, "prior_precision": DELTA, "fisher": "mc", "mc_samples": 2, "seed": 5}

    def made():
        return LinearizedLaplace(problem.model, problem.likelihood, **options)

    together = made().fit([batch for part in parts for batch in part])
    fitted = made().fit(parts[0]).update(parts[1]).update(parts[2])
    torch.testing.assert_close(fitted.covariance(problem.query), together.covariance(problem.query), rtol=1e-9, atol=0)
    loaded = made().load_state_dict(made().fit(parts[0]).state_dict())
    before = loaded.variance(problem.query)
    with pytest.raises(NotFittedError, match="attach_data"):
        loaded.update(parts[1])
    assert loaded.n_data_ == 20
    assert torch.equal(loaded.variance(problem.query), before)
    loaded.attach_data(parts[0])
    loaded.update(parts[1]).update(parts[2])
    torch.testing.assert_close(loaded.covariance(problem.query), together.covariance(problem.query), rtol=1e-9, atol=0)


@pytest.mark.parametrize("options", [{"n_parameters": 6}, {"n_parameters": 6, "chosen_by": "magnitude"}, {}])
def test_the_weights_of_a_subnetwork_are_chosen_from_all_rows(problem, options):
    x = problem.x.clone()
    x[:9, 0] = 0  # the earlier rows leave the first input unused

    def made():
        return SubnetworkLaplace(problem.model, problem.likelihood, prior_precision=DELTA, **options)

    earlier, new = [(x[:9], problem.y[:9])], [(x[9:14], problem.y[9:14]), (x[14:], problem.y[14:])]
    together = made().fit([*earlier, *new])
    fitted = made().fit(earlier)
    by_data = options == {"n_parameters": 6}
    assert torch.equal(fitted.index_, together.index_) is not by_data
    state = fitted.state_dict()
    fitted.update(new)
    assert torch.equal(fitted.index_, together.index_)
    torch.testing.assert_close(fitted.covariance(problem.query), together.covariance(problem.query), rtol=1e-9, atol=0)
    loaded = made().load_state_dict(state)
    if by_data:
        before = loaded.variance(problem.query)
        with pytest.raises(NotFittedError, match="attach_data"):
            loaded.update(new)
        assert loaded.n_data_ == 9
        assert torch.equal(loaded.variance(problem.query), before)
        loaded.attach_data(earlier)
    loaded.update(new)
    torch.testing.assert_close(loaded.covariance(problem.query), together.covariance(problem.query), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["cholesky", "last-full"])
def test_the_choice_of_the_validation_rows_is_kept(make_problem, name):
    problem = make_problem("regression")
    rows, x = [(problem.x[:9], problem.y[:9])], problem.query
    far = 3 * torch.randn(40, 4, dtype=torch.float64)  # targets that need another prior precision
    y = SUMS[name](problem).fit(rows).clone_with(prior_precision=0.25).sample(far, 1)[0]
    fitted = SUMS[name](problem).fit(rows, val_loader=[(far, y + 0.6 * torch.randn_like(y))])
    record, chosen = fitted.calibration_, fitted.prior_precision_
    assert chosen != DELTA
    fitted.update([(problem.x[9:15], problem.y[9:15])])
    assert fitted.calibration_ is record
    assert fitted.prior_precision_ == chosen
    expected = SUMS[name](problem).fit([(problem.x[:15], problem.y[:15])]).clone_with(prior_precision=chosen)
    again = SUMS[name](problem).load_state_dict(fitted.state_dict())
    for other in (fitted, again, fitted.clone_with()):
        assert other.prior_precision_ == pytest.approx(chosen)
        torch.testing.assert_close(other.variance(x), expected.variance(x), rtol=1e-9, atol=0)
        calibrated = record.calibration.apply(expected.predict(x))
        torch.testing.assert_close(other.predict(x).total_variance, calibrated.total_variance, rtol=1e-9, atol=0)


def test_a_tuned_fit_still_warns_that_its_calibration_is_not_saved(problem):
    fitted = SUMS["diag"](problem).fit([(problem.x[:9], problem.y[:9])])
    tuned = tune(fitted, [(problem.x[9:], problem.y[9:])], option=None)
    tuned.estimator.update([(problem.x[9:15], problem.y[9:15])])
    with pytest.warns(CalibrationNotSavedWarning):
        tuned.estimator.state_dict()


def test_what_is_no_sum_is_rejected_and_unchanged(problem):
    for options in ({"hessian_structure": "kron"}, {"hessian_structure": "lowrank"}, {"inverse": "cg"}):
        fitted = LinearizedLaplace(problem.model, problem.likelihood, **options).fit(problem.loader)
        with pytest.raises(UnsupportedError, match="sum over rows"):
            fitted.update(problem.loader)
        assert fitted.n_data_ == len(problem.x)
    fitted = LastLayerLaplace(problem.model, problem.likelihood, hessian_structure="kron").fit(problem.loader)
    with pytest.raises(UnsupportedError, match="sum over rows"):
        fitted.update(problem.loader)


@pytest.mark.parametrize("kind", [MAP, RegVar, LastLayerLaplace])
def test_estimators_without_updates_or_evidence_say_so(problem, kind):
    estimator = kind(problem.model, problem.likelihood)
    queries = [lambda: estimator.update(problem.loader), estimator.log_marginal_likelihood]
    for query in queries:
        with pytest.raises(NotFittedError):
            query()
    if kind is LastLayerLaplace:
        return
    estimator.fit(problem.loader)
    for query in queries:
        with pytest.raises(UnsupportedError, match=kind.__name__):
            query()


def test_a_subnetwork_of_given_weights_is_the_dense_formula(problem, by_hand):
    index = torch.tensor([29, 0, 3, 20])
    masks = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in problem.model.named_parameters()}
    masks["0.weight"][0, 0], masks["0.weight"][0, 3], masks["0.bias"][0] = True, True, True
    masks["2.weight"].view(-1)[4] = True  # 20 + 5 + 4
    formulas = by_hand(problem)
    order = index.sort().values
    precision = formulas.data_ggn()[order][:, order] + DELTA * torch.eye(4, dtype=torch.float64)
    jacobian = formulas.jacobian(problem.query)[..., order]
    expected = jacobian @ torch.linalg.inv(precision) @ jacobian.transpose(1, 2)
    for given in (index, index.tolist(), masks):
        options = {"prior_precision": DELTA, "subnetwork_indices": given}
        fitted = SubnetworkLaplace(problem.model, problem.likelihood, **options).fit(problem.loader)
        torch.testing.assert_close(fitted.covariance(problem.query), expected, rtol=1e-9, atol=0)
        assert fitted.index_.tolist() == order.tolist()
        again = SubnetworkLaplace(problem.model, problem.likelihood, **options).load_state_dict(fitted.state_dict())
        assert torch.equal(again.variance(problem.query), fitted.variance(problem.query))


@pytest.mark.parametrize("given", [[], [0, 0], [-1], [1.5], [10**6], {"0.weight": torch.ones(2, dtype=torch.bool)}])
def test_bad_indices_are_rejected(problem, given):
    with pytest.raises(OptionError, match="subnetwork_indices"):
        SubnetworkLaplace(problem.model, problem.likelihood, subnetwork_indices=given).fit(problem.loader)


def test_indices_do_not_go_with_a_choice(problem):
    with pytest.raises(OptionError, match="leave out"):
        SubnetworkLaplace(problem.model, problem.likelihood, subnetwork_indices=[0], n_parameters=5)
