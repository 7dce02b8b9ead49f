"""`bdl-bench verify`: exit codes, and the path of its page as the last line."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from bdl_bench.cli import app
from bdl_bench.verify.run import VerifyResult
from estimators.errors import OptionError

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


def test_a_custom_model_is_verified_and_the_last_line_is_the_page(my_model, tmp_path):
    result = verify("--model", my_model, "--subset", "0.*,2.bias", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    page = Path(result.stdout.splitlines()[-1])
    assert page == tmp_path / "out" / "verify.md"
    assert {path.name for path in page.parent.iterdir()} == {
        "verify.md",
        "verify.json",
        "lambda_sweep.png",
        "lambda_sweep.svg",
    }
    assert "agrees" in result.stdout
    assert "λ bias" in result.stdout


@pytest.mark.parametrize(
    ("text", "names"), [("0.weight, 2.bias", ["0.weight", "2.bias"]), (" 0.* ", "0.*"), ("last_layer", "last_layer")]
)
def test_names_of_a_subset_have_no_outer_spaces(text, names, my_model, tmp_path, monkeypatch):
    passed = []

    def stop(*_, subset_of_weights, **__):
        passed.append(subset_of_weights)
        raise OptionError("a run", received="a test", remedy="none.")

    monkeypatch.setattr("bdl_bench.verify.run.verify_problems", stop)
    assert verify("--model", my_model, "--subset", text, "--out", tmp_path / "out").exit_code == 2
    assert passed == [names]


@pytest.mark.parametrize(
    "words",
    [
        ("no-such-task",),
        ("--model", "nowhere:nothing"),
        ("--curvature", "fisher"),
        ("--subset", "nothing.*"),
        ("--subset", ""),
    ],
    ids=" ".join,
)
def test_bad_usage_ends_with_two_and_a_message(words, my_model, tmp_path):
    model = () if words[0] in ("no-such-task", "--model") else ("--model", my_model)
    result = verify(*model, *words, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "Expected" in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_error_above_its_bound_ends_with_one(my_model, tmp_path, monkeypatch):
    monkeypatch.setattr("bdl_bench.verify.verification.EXACT_BOUND", 0.0)
    assert verify("--model", my_model, "--out", tmp_path / "out").exit_code == 1


def test_without_a_task_one_small_task_per_likelihood_is_verified(tmp_path, monkeypatch):
    passed = {}

    def verified(problems, **options):
        passed.update(problems)
        return VerifyResult((), options["out"])

    monkeypatch.setattr("bdl_bench.verify.run.verify_problems", verified)
    result = verify("--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert {problem.likelihood.kind for problem in passed.values()} == {"regression", "classification", "binary"}
    assert all(problem.n_parameters < 600 for problem in passed.values())


def test_each_option_of_verify_reaches_the_verification(my_model, tmp_path, monkeypatch):
    passed = {}

    def verified(problems, **options):
        passed.update(options, names=list(problems))
        passed.pop("listener")
        return VerifyResult((), options["out"])

    monkeypatch.setattr("bdl_bench.verify.run.verify_problems", verified)
    result = verify("--model", my_model, "--curvature", "hessian", "--subset", "0.*,2.bias", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert passed == {
        "out": tmp_path / "out",
        "names": [my_model],
        "curvature": "hessian",
        "subset_of_weights": ["0.*", "2.bias"],
        "n_queries": 2,
    }
