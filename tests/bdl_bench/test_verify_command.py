"""`bdl-bench verify`: exit codes, and the path of its page as the last line."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from bdl_bench.cli import app
from bdl_bench.cli import commands as cli
from bdl_bench.verify.cases import Case
from bdl_bench.verify.run import VerifyResult, verify_test_problems

MODULE = '''
import torch
from bdl_bench import Problem

def make_problem(seed):
    """A network of my own."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)).eval()
    x, y = torch.randn(9, 2), torch.randint(0, 2, (9, 2)).float()
    return Problem(model, "binary", [(x, y)], [(x, y)], [(x, y)], prior_precision=2.0)
'''


@pytest.fixture
def my_model(tmp_path, monkeypatch):
    (tmp_path / "my_verified_network.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "my_verified_network:make_problem"


def verify(*words):
    return CliRunner().invoke(app, ["verify", *(str(word) for word in words), "--n-queries", "2"])


def test_one_s_own_model_is_proved_and_the_last_line_is_the_page(my_model, tmp_path):
    result = verify("--model", my_model, "--subset", "0.*,2.bias", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    page = Path(result.stdout.splitlines()[-1])
    assert page == tmp_path / "out" / "verify.md"
    assert {path.name for path in page.parent.iterdir()} == {"verify.md", "verify.json", "ladder.png", "ladder.svg"}
    assert "agrees" in result.stdout
    assert "λ bias" in result.stdout


@pytest.mark.parametrize(
    "words",
    [("no-such-task",), ("--model", "nowhere:nothing"), ("--curvature", "fisher"), ("--subset", "nothing.*")],
    ids=" ".join,
)
def test_bad_usage_ends_with_two_and_a_message(words, my_model, tmp_path):
    model = () if words[0] in ("no-such-task", "--model") else ("--model", my_model)
    result = verify(*model, *words, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "Expected" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_bound_that_does_not_hold_ends_with_one(my_model, tmp_path, monkeypatch):
    monkeypatch.setattr("bdl_bench.verify.checks.EXACT", 0.0)
    assert verify("--model", my_model, "--out", tmp_path / "out").exit_code == 1


def test_without_a_model_the_zoo_is_proved_case_by_case(tmp_path, monkeypatch):
    few = [Case("mlp", "binary", "early", curvature, "last_layer") for curvature in ("ggn", "hessian")]
    monkeypatch.setattr(cli, "verify_test_problems", lambda **how: verify_test_problems(cases=few, **how))
    result = verify("--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert [line for line in result.stdout.splitlines() if line in map(str, few)] == [str(case) for case in few]


def test_each_option_of_verify_reaches_the_verification(my_model, tmp_path, monkeypatch):
    passed = {}

    def verified(problem, **options):  # noqa: ARG001
        passed.update(options)
        return VerifyResult((), options["out"])

    monkeypatch.setattr(cli, "verify_problem", verified)
    result = verify("--model", my_model, "--curvature", "hessian", "--subset", "0.*,2.bias", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert passed == {
        "out": tmp_path / "out",
        "name": my_model,
        "curvature": "hessian",
        "subset_of_weights": ["0.*", "2.bias"],
        "n_queries": 2,
    }
