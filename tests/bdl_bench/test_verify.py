"""`verify` on one's own model: the parts of the error, the files, and what it refuses."""

import json
from dataclasses import replace

import pytest
import torch
from cases import relative_error
from torch import nn

from bdl_bench.problem import Problem
from bdl_bench.verify.cases import Case
from bdl_bench.verify.checks import Check, Verification, verify
from bdl_bench.verify.decomposition import decompose
from bdl_bench.verify.lambda_sweep import LambdaSweep
from bdl_bench.verify.run import verify_problem, write_result
from bdl_bench.verify.table import to_markdown
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


def diagonal(covariance):
    return covariance.diagonal(dim1=1, dim2=2)


@pytest.fixture(scope="module")
def links():
    case = Case("mlp", "classification", "polished", "ggn", "all")
    return case, {link.name: link for link in decompose(case.problem, "all", case.names, n_draws=16)}


def test_each_part_of_the_error_is_a_difference_of_two_variances(links):
    case, parts = links
    reference, x = case.reference, case.problem.queries
    ggn, hessian = (diagonal(reference.covariance(x, curvature)) for curvature in ("ggn", "hessian"))
    assert parts["curvature gap"].error == pytest.approx(relative_error(ggn, hessian))
    assert parts["curvature gap"].mean_ratio == pytest.approx(float((ggn / hessian).mean()))
    head = case.problem.reference([name for name in case.names if name.startswith("2.")])
    last = diagonal(head.covariance(x, "ggn"))
    assert parts["structure gap"].error == pytest.approx(relative_error(last, ggn))


def test_the_parts_have_the_sizes_that_their_names_promise(links):
    _, parts = links
    assert parts["structure gap"].mean_ratio < 1  # a part of the weights never has more variance
    assert 1e-4 < parts["Monte Carlo"].error < 1
    assert parts["λ bias"].error < 0.02
    assert parts["solver"].error < 0.2
    chain = sum(parts[name].error for name in ("Monte Carlo", "λ bias", "solver"))
    assert parts["together"].error <= 1.5 * chain


def test_an_indefinite_hessian_leaves_its_gap_open_and_says_why():
    case = Case("mlp", "binary", "early", "ggn", "all")
    parts = {link.name: link for link in decompose(case.problem, "all", case.names, n_draws=2)}
    assert parts["curvature gap"].error is None
    assert "smallest eigenvalue -" in parts["curvature gap"].note


def test_a_network_in_float32_is_proved_on_a_copy_in_float64_and_left_alone(tmp_path):
    problem = make_problem(torch.float32)
    before = {name: p.clone() for name, p in problem.model.named_parameters()}
    result = verify_problem(problem, out=tmp_path, lams=LAMS, n_queries=3)
    assert result.holds
    assert any("float64" in note for note in result.proofs[0].notes)
    assert "float64" in (tmp_path / "verify.md").read_text()
    for name, p in problem.model.named_parameters():
        assert p.dtype == torch.float32
        assert torch.equal(p, before[name])


def test_the_files_hold_what_was_measured(tmp_path):
    result = verify_problem(make_problem(), out=tmp_path, lams=LAMS, n_queries=2, subset_of_weights=["0.*", "2.bias"])
    content = json.loads((tmp_path / "verify.json").read_text())["proofs"][0]
    assert content["n_parameters"] == 19
    assert content["verdict"] == "agrees"
    assert content["orders"]["central"]["slope"] == pytest.approx(2, abs=0.15)
    assert content["ladders"]["forward"]["lams"] == list(LAMS)
    assert {link["name"] for link in content["links"]} >= {"λ bias", "solver", "Monte Carlo", "structure gap"}
    text = (tmp_path / "verify.md").read_text()
    assert "structure gap" in text
    assert "[TODO]" not in text
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
    assert b"</svg>" in (tmp_path / "ladder.svg").read_bytes()
    assert result.out == tmp_path


def test_a_problem_with_a_recipe_is_trained_first(tmp_path):
    recipe = Recipe(epochs=3, batch_size=8)
    result = verify_problem(make_problem(recipe=recipe), out=tmp_path, lams=LAMS, n_queries=2)
    assert "trained here" in " ".join(result.proofs[0].notes)


def test_an_indefinite_hessian_is_a_verdict_and_not_a_failure(tmp_path):
    case = Case("mlp", "binary", "early", "hessian", "all")
    proof = verify(case.problem, Check("hessian", "all", case.names), name="early", lams=LAMS, split=False)
    assert not proof.definite
    assert proof.failures() == []
    assert proof.ladders == {}
    assert "refused, as it must be" in to_markdown([proof])
    assert (write_result([proof], tmp_path).out / "ladder.png").exists()


def test_a_network_too_large_for_the_dense_reference_is_refused_with_its_size(tmp_path):
    with pytest.raises(TooLargeError, match="140,003 parameters") as caught:
        verify_problem(make_problem(width=20_000), out=tmp_path)
    assert caught.value.bytes_needed > caught.value.bytes_available
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "bad", [{"curvature": "fisher"}, {"n_queries": 0}, {"subset_of_weights": "nothing.*"}], ids=str
)
def test_bad_options_are_refused(bad, tmp_path):
    with pytest.raises(OptionError):
        verify_problem(make_problem(), out=tmp_path, **bad)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    case = Case("mlp", "binary", "early", "hessian", "all")
    proof = verify(case.problem, Check("hessian", "all", case.names), name="early", lams=LAMS, split=False)

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(atomic.os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_result([proof], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_fails_is_said_in_words():
    case = Case("mlp", "classification", "polished", "ggn", "all")
    proof = verify(case.problem, Check("ggn", "all", case.names), name="coarse", lams=(3e-2, 1e-2, 3e-3), split=False)
    assert any("best rung" in failure for failure in proof.failures())
    assert "fails" in to_markdown([proof])


_QUADRATIC_IN_LAM = LambdaSweep("forward", LAMS, tuple(lam**2 for lam in LAMS), (None,) * len(LAMS))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"exact": {"laplace cg": 1e-7}}, "laplace cg: error 1.0e-07"),
        ({"refusals": {"laplace cg": "ConvergenceError: 3 iterations"}}, "laplace cg: ConvergenceError"),
        ({"ladders": {"forward": _QUADRATIC_IN_LAM}}, "forward: slope 2.000"),
        ({"spectrum": (-1.0, 2.0)}, "laplace cholesky"),
        ({"spectrum": (-1.0, 2.0), "exact": {}, "refusals": {"laplace cg": "TooLargeError: 3 bytes"}}, "TooLargeError"),
    ],
    ids=["large error", "error raised", "wrong order", "indefinite accepted", "indefinite with another error"],
)
def test_each_bound_that_does_not_hold_is_one_failure(changed, named):
    holds = Verification(
        "network",
        "ggn",
        "all",
        n_parameters=2,
        n_rows=3,
        relative_gradient=0.0,
        spectrum=(1.0, 2.0),
        exact={"laplace cholesky": 1e-9},
    )
    assert holds.failures() == []
    (failure,) = replace(holds, **changed).failures()
    assert named in failure
