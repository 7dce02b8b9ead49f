"""`verify` on a custom model: the parts of the error, the files, and the errors that it raises."""

import json
from dataclasses import replace

import pytest
import torch
from cases import relative_error
from torch import nn
from verification_cases import Case

from bdl_bench.problem import Problem
from bdl_bench.verify.error_parts import error_parts_of
from bdl_bench.verify.lambda_sweep import LambdaSweep
from bdl_bench.verify.run import verify_problems, write_result
from bdl_bench.verify.table import to_markdown
from bdl_bench.verify.verification import Check, Verification, verify
from estimators.errors import OptionError, TooLargeError
from estimators.persistence import atomic
from estimators.training import Recipe

LAMS = (1e-2, 1e-3, 1e-4, 1e-5)


def make_problem(dtype=torch.float64, width=4, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 3)).to(dtype).eval()
        x, y = torch.randn(21, 3, dtype=dtype), torch.randint(0, 3, (21,))
    loader = list(zip(x.split(8), y.split(8), strict=True))
    return Problem(model, "classification", loader, loader, loader, prior_precision=1.5, **options)


def verified(problem, **options):
    return verify_problems({"mine": problem}, **options)


def diagonal(covariance):
    return covariance.diagonal(dim1=1, dim2=2)


@pytest.fixture(scope="module")
def error_parts():
    case = Case("mlp", "classification", "converged", "ggn", "all")
    return case, {part.name: part for part in error_parts_of(case.problem, "all", case.names, n_draws=16)}


def test_each_part_of_the_error_is_a_difference_of_two_variances(error_parts):
    case, parts = error_parts
    reference, x = case.reference, case.problem.queries
    ggn, hessian = (diagonal(reference.covariance(x, curvature)) for curvature in ("ggn", "hessian"))
    assert parts["curvature gap"].error == pytest.approx(relative_error(ggn, hessian))
    assert parts["curvature gap"].mean_ratio == pytest.approx(float((ggn / hessian).mean()))
    head = case.problem.reference([name for name in case.names if name.startswith("2.")])
    last = diagonal(head.covariance(x, "ggn"))
    assert parts["structure gap"].error == pytest.approx(relative_error(last, ggn))


def test_the_parts_have_the_sizes_that_their_names_promise(error_parts):
    _, parts = error_parts
    assert parts["structure gap"].mean_ratio < 1  # a part of the weights never has more variance
    assert 1e-4 < parts["Monte Carlo"].error < 1
    assert parts["λ bias"].error < 0.02
    assert parts["solver"].error < 0.2
    chain = sum(parts[name].error for name in ("Monte Carlo", "λ bias", "solver"))
    assert parts["together"].error <= 1.5 * chain


def test_an_indefinite_hessian_has_no_curvature_gap_and_a_note():
    case = Case("mlp", "binary", "early", "ggn", "all")
    parts = {part.name: part for part in error_parts_of(case.problem, "all", case.names, n_draws=2)}
    assert parts["curvature gap"].error is None
    assert "smallest eigenvalue -" in parts["curvature gap"].note


def test_a_network_in_float32_is_verified_on_a_copy_in_float64_and_left_alone(tmp_path):
    problem = make_problem(torch.float32)
    before = {name: p.clone() for name, p in problem.model.named_parameters()}
    result = verified(problem, out=tmp_path, lams=LAMS, n_queries=3)
    assert result.passed
    assert any("float64" in note for note in result.verifications[0].notes)
    assert "float64" in (tmp_path / "verify.md").read_text()
    for name, p in problem.model.named_parameters():
        assert p.dtype == torch.float32
        assert torch.equal(p, before[name])


def test_the_files_hold_what_was_measured(tmp_path):
    result = verified(make_problem(), out=tmp_path, lams=LAMS, n_queries=2, subset_of_weights=["0.*", "2.bias"])
    content = json.loads((tmp_path / "verify.json").read_text())["verifications"][0]
    assert content["n_parameters"] == 19
    assert content["verdict"] == "agrees"
    assert content["orders"]["central"]["slope"] == pytest.approx(2, abs=0.15)
    assert content["sweeps"]["forward"]["lams"] == list(LAMS)
    assert {part["name"] for part in content["error_parts"]} >= {"λ bias", "solver", "Monte Carlo", "structure gap"}
    text = (tmp_path / "verify.md").read_text()
    assert "structure gap" in text
    assert "[TODO]" not in text
    assert (tmp_path / "lambda_sweep.png").read_bytes().startswith(b"\x89PNG")
    assert b"</svg>" in (tmp_path / "lambda_sweep.svg").read_bytes()
    assert result.out == tmp_path


def test_a_problem_with_a_recipe_is_trained_first(tmp_path):
    recipe = Recipe(epochs=3, batch_size=8)
    result = verified(make_problem(recipe=recipe), out=tmp_path, lams=LAMS, n_queries=2)
    assert "trained here" in " ".join(result.verifications[0].notes)


def test_an_indefinite_hessian_is_a_verdict_and_not_a_failure(tmp_path):
    case = Case("mlp", "binary", "early", "hessian", "all")
    verification = verify(
        case.problem, Check("hessian", "all", case.names), name="early", lams=LAMS, with_error_parts=False
    )
    assert not verification.definite
    assert verification.failures() == []
    assert verification.sweeps == {}
    assert "indefinite, as reported" in to_markdown([verification])
    assert (write_result([verification], tmp_path).out / "lambda_sweep.png").exists()


def test_a_network_too_large_for_the_dense_reference_raises_with_its_size(tmp_path):
    with pytest.raises(TooLargeError, match="140,003 parameters") as caught:
        verified(make_problem(width=20_000), out=tmp_path)
    assert caught.value.bytes_needed > caught.value.bytes_available
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "bad", [{"curvature": "fisher"}, {"n_queries": 0}, {"subset_of_weights": "nothing.*"}], ids=str
)
def test_bad_options_raise(bad, tmp_path):
    with pytest.raises(OptionError):
        verified(make_problem(), out=tmp_path, **bad)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    case = Case("mlp", "binary", "early", "hessian", "all")
    verification = verify(
        case.problem, Check("hessian", "all", case.names), name="early", lams=LAMS, with_error_parts=False
    )

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(atomic.os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_result([verification], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_failures_are_described_in_words():
    case = Case("mlp", "classification", "converged", "ggn", "all")
    verification = verify(
        case.problem, Check("ggn", "all", case.names), name="coarse", lams=(3e-2, 1e-2, 3e-3), with_error_parts=False
    )
    assert any("best step" in failure for failure in verification.failures())
    assert "fails" in to_markdown([verification])


_QUADRATIC_IN_LAM = LambdaSweep("forward", LAMS, tuple(lam**2 for lam in LAMS), (None,) * len(LAMS))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"exact": {"laplace cg": 1e-7}}, "laplace cg: error 1.0e-07"),
        ({"raised": {"laplace cg": "ConvergenceError: 3 iterations"}}, "laplace cg: ConvergenceError"),
        ({"sweeps": {"forward": _QUADRATIC_IN_LAM}}, "forward: slope 2.000"),
        ({"spectrum": (-1.0, 2.0)}, "laplace cholesky"),
        ({"spectrum": (-1.0, 2.0), "exact": {}, "raised": {"laplace cg": "TooLargeError: 3 bytes"}}, "TooLargeError"),
    ],
    ids=["large error", "error raised", "wrong order", "indefinite accepted", "indefinite with another error"],
)
def test_each_exceeded_bound_is_one_failure(changed, named):
    passing = Verification(
        "network",
        "ggn",
        "all",
        n_parameters=2,
        n_rows=3,
        relative_gradient=0.0,
        spectrum=(1.0, 2.0),
        exact={"laplace cholesky": 1e-9},
    )
    assert passing.failures() == []
    (failure,) = replace(passing, **changed).failures()
    assert named in failure
