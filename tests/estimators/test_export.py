"""Exported modules: equal to `predict`, loaded by torch alone, with errors for what has no closed expression."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from estimators import (
    Categorical,
    Gaussian,
    LastLayerLaplace,
    LinearizedLaplace,
    LinearResponse,
    Pointwise,
    PosteriorDraws,
    RegVar,
    tune,
)
from estimators.baselines import MAP, DeepEnsemble
from estimators.errors import DerivativeRouteWarning, ModelError, OptionError, TuningBoundaryWarning, UnsupportedError
from estimators.estimator import export
from estimators.tuning import CalibrationGrid

DELTA = 2.5


class Blend(nn.Module):
    """Takes keywords, of which rows share one; the layer norm is neither linear nor free of parameters."""

    def __init__(self):
        super().__init__()
        self.norm, self.hidden, self.end = nn.LayerNorm(4), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, values, shift):
        return self.end(torch.tanh(self.hidden(self.norm(values + shift))))


class Branch(nn.Module):
    """Branches on the values of its inputs, row by row."""

    def __init__(self):
        super().__init__()
        self.end = nn.Linear(4, 2)

    def forward(self, x):
        return torch.stack([self.end(row if float(row.sum()) > 0 else 2 * row) for row in x])


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.norm, self.end = nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, tokens):
        return self.end(self.norm(self.embedding(tokens)).tanh().mean(1))


class Counted(nn.Module):
    """Counts its forwards in a buffer."""

    def __init__(self):
        super().__init__()
        self.hidden, self.end = nn.Linear(4, 5), nn.Linear(5, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.end(self.hidden(x).tanh())


def draws_of_tokens():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randint(0, 7, (11, 5), generator=generator), torch.randint(0, 3, (11,), generator=generator)
    regularizer = PosteriorDraws(4, variance_estimate="monte_carlo")
    solved = {"regularizer": regularizer, "solver": LinearResponse(), "prior_precision": DELTA}
    return RegVar(Tokens().double().eval(), "classification", **solved).fit([(x[:7], y[:7]), (x[7:], y[7:])]), x


def convolutions():
    layers = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 3)
    return nn.Sequential(*layers).double().eval()


def classes(n=11):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 1, 4, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (n,), generator=generator)


def blended(n):
    """Inputs of `Blend`."""
    generator = torch.Generator().manual_seed(n)
    values, shift = (torch.randn(m, 4, generator=generator, dtype=torch.float64) for m in (n, 1))
    return {"values": values, "shift": shift}


def check_equal(fitted, path, *queries):
    """The loaded module has the outputs of `predict`, at other numbers of rows than that of the example."""
    module = torch.export.load(path).module()
    for x in queries:
        expected, found = fitted.predict(x), module(**x) if isinstance(x, dict) else module(x)
        assert found.keys() == {"mean", "epistemic_variance"} | (
            {"total_variance"} if expected.kind == "regression" else {"probs"}
        )
        for name, value in found.items():
            torch.testing.assert_close(value, getattr(expected, name), rtol=1e-8, atol=1e-12)


def test_derivatives_of_a_convolutional_network_are_exported(tmp_path):
    (x, y), options = classes(), {"prior_precision": DELTA, "inverse": "cholesky"}
    fitted = LinearizedLaplace(convolutions(), "classification", **options).fit([(x[:7], y[:7]), (x[7:], y[7:])])
    fitted.export(tmp_path / "fit.pt2", x[:3])
    check_equal(fitted, tmp_path / "fit.pt2", classes(1)[0], classes(4)[0])  # 4 is a size of the inputs, too


def test_a_network_with_a_buffer_that_each_forward_changes_is_exported(tmp_path):
    model, x = Counted().double().eval(), torch.randn(7, 4, dtype=torch.float64)
    with pytest.warns(DerivativeRouteWarning):  # vmap cannot change the buffer
        fitted = LinearizedLaplace(model, Gaussian(0.6)).fit([(x, x[:, :2])])
    fitted.export(tmp_path / "fit.pt2", x[:3])
    check_equal(fitted, tmp_path / "fit.pt2", x[:1], x)
    assert model.calls == 0


def test_draws_of_a_network_with_embeddings_are_exported(tmp_path):
    fitted, x = draws_of_tokens()
    fitted.export(tmp_path / "fit.pt2", x[:3])
    check_equal(fitted, tmp_path / "fit.pt2", x[:1], x)


def test_an_operation_without_a_rule_for_all_rows_is_exported_row_by_row(tmp_path, monkeypatch):
    def no_rule(*_):
        raise ModelError("operations that torch can apply to any number of rows", received="another", remedy="none.")

    monkeypatch.setattr(export, "graph_of_rows", no_rule)
    fitted, x = draws_of_tokens()
    fitted.export(tmp_path / "fit.pt2", x[:3])
    check_equal(fitted, tmp_path / "fit.pt2", x[:1], x)


def test_one_row_after_the_other_gives_what_all_rows_give(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_LARGE_JACOBIAN", 0)
    (x, y), likelihood = classes(), Gaussian(sigma_noise=0.6)
    kron = {"prior_precision": DELTA, "hessian_structure": "kron"}
    fitted = LinearizedLaplace(convolutions(), "classification", **kron).fit([(x[:7], y[:7]), (x[7:], y[7:])])
    fitted.export(tmp_path / "fit.pt2", x[:3])
    check_equal(fitted, tmp_path / "fit.pt2", classes(1)[0], classes(4)[0])
    batches = [(blended(n), torch.randn(n, 2, dtype=torch.float64)) for n in (6, 5)]
    fitted = LinearizedLaplace(Blend().double().eval(), likelihood, **kron).fit(batches)
    fitted.export(tmp_path / "fit.pt2", blended(2))
    check_equal(fitted, tmp_path / "fit.pt2", blended(1), blended(8))


@pytest.mark.verification  # the default RegVar, below, exports such bounds by the same code
def test_the_bounds_of_posterior_draws_are_exported(make_problem, tmp_path):
    problem = make_problem("regression")
    regularizer = PosteriorDraws(4, variance_estimate="bounds")
    options = {"prior_precision": DELTA, "regularizer": regularizer, "solver": LinearResponse()}
    fitted = RegVar(problem.model, problem.likelihood, **options).fit(problem.loader)
    fitted.export(tmp_path / "fit.pt2", problem.query)
    check_equal(fitted, tmp_path / "fit.pt2", problem.x)


def test_a_calibrated_fit_is_exported_as_it_predicts(make_problem, tmp_path):
    problem = make_problem("classification")
    fitted = LinearizedLaplace(problem.model, problem.likelihood, hessian_structure="diag").fit(problem.loader)
    grid = CalibrationGrid(variance_scales=(0.3,), softmax_temperatures=(1.7,))
    with pytest.warns(TuningBoundaryWarning):  # a single temperature
        tuned = tune(fitted, problem.loader, option=None, grid=grid, refine=False)
    tuned.export(tmp_path / "fit.pt2", problem.query)
    found = torch.export.load(tmp_path / "fit.pt2").module()(problem.x)
    torch.testing.assert_close(found["probs"], tuned.predict(problem.x).probs, rtol=1e-9, atol=0)
    assert not torch.allclose(found["probs"], fitted.predict(problem.x).probs, rtol=1e-3)


def test_keywords_and_inputs_that_rows_share_are_exported(tmp_path):
    likelihood, model = Gaussian(sigma_noise=0.6), Blend().double().eval()
    batches = [(blended(n), torch.randn(n, 2, dtype=torch.float64)) for n in (6, 5)]
    fitted = LinearizedLaplace(model, likelihood, prior_precision=DELTA, hessian_structure="kron").fit(batches)
    fitted.export(tmp_path / "fit.pt2", blended(2))
    check_equal(fitted, tmp_path / "fit.pt2", blended(1), blended(8))


def test_members_are_averaged_as_predict_does(tmp_path):
    x, y = classes()
    members = [convolutions() for _ in range(3)]
    fitted = DeepEnsemble(members[0], "classification", members=members[1:]).fit([(x, y)])
    fitted.export(tmp_path / "fit.pt2", x[:2])
    check_equal(fitted, tmp_path / "fit.pt2", classes(5)[0])


def test_the_file_is_loaded_without_this_library(tmp_path):
    x, y = classes()
    fitted = LastLayerLaplace(convolutions(), Categorical(), prior_precision=DELTA).fit([(x, y)])
    fitted.export(tmp_path / "fit.pt2", x)
    expected = fitted.predict(x)
    torch.save((x, expected.mean, expected.epistemic_variance, expected.probs), tmp_path / "expected.pt")
    program = f"""
        import sys
        sys.modules["estimators"] = sys.modules["bdl_bench"] = None  # an import of these raises
        import torch
        x, *expected = torch.load(r"{tmp_path / "expected.pt"}")
        found = torch.export.load(r"{tmp_path / "fit.pt2"}").module()(x)
        for value, name in zip(expected, ("mean", "epistemic_variance", "probs"), strict=True):
            torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-12)
        print("equal")
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == "equal", ran.stderr


def test_what_has_no_closed_expression_is_not_exported(make_problem, tmp_path):
    problem = make_problem("regression")
    solvers = [
        LinearizedLaplace(problem.model, problem.likelihood, inverse="cg"),
        RegVar(problem.model, problem.likelihood, regularizer=Pointwise(), solver=LinearResponse()),
    ]
    for estimator in solvers:
        with pytest.raises(UnsupportedError, match="closed expression"):
            estimator.fit(problem.loader).export(tmp_path / "fit.pt2", problem.query)
    with pytest.raises(OptionError, match="pt2"):
        solvers[0].export(tmp_path / "fit.pt", problem.query)
    assert not list(tmp_path.iterdir())


def test_a_branch_on_values_cannot_be_exported(make_problem, tmp_path):
    problem = make_problem("regression", model=Branch())
    fitted = MAP(problem.model, problem.likelihood).fit(problem.loader)
    with pytest.raises(ModelError, match="branches on the values"):
        fitted.export(tmp_path / "fit.pt2", problem.query)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::estimators.errors.UncalibratedWarning")
@pytest.mark.parametrize(
    "refined", [False, pytest.param(True, marks=pytest.mark.verification)], ids=["fitted", "refined"]
)
def test_the_default_regvar_is_exported(refined, make_problem, tmp_path):
    problem = make_problem("regression")
    fitted = RegVar(problem.model, problem.likelihood, prior_precision=DELTA, rtol=0.2).fit(problem.loader)
    if refined:
        fitted = fitted.refine(problem.query, rtol=1e-3)
    fitted.export(tmp_path / "fit.pt2", problem.query)
    check_equal(fitted, tmp_path / "fit.pt2", problem.x)
