"""Every preset answers every question in the dtype of the network: tasks with pretrained weights are in float32."""

import pytest
import torch
from torch import nn

from bdl_bench import Problem
from bdl_bench.methods import METHODS
from estimators.errors import IndefiniteHessianError, UnsupportedError
from estimators.runtime.rng import preserved_random_state
from estimators.training.training import Recipe

QUESTIONS = ("variance", "covariance", "joint_covariance", "standard_error")


def make():
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.1), nn.Tanh(), nn.Linear(8, 2)).eval()


@pytest.fixture(scope="module")
def problem():
    with preserved_random_state():
        torch.manual_seed(0)
        x, model = torch.randn(40, 3), make()
    train, validation, test = (list(zip(part.split(16), (part[:, 0] > 0).long().split(16), strict=True)) for part in
                               (x[:27], x[27:33], x[33:]))  # fmt: skip
    recipe = Recipe(epochs=5, batch_size=16, optimizer="adam", lr=1e-2)
    return Problem(
        model, "classification", train, validation, test, prior_precision=1.3, recipe=recipe, make_model=make
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", METHODS)
def test_all_answers_have_the_dtype_of_a_float32_network(name, problem):
    queries = problem.test[0][0]
    try:
        fitted = METHODS[name].build(problem, 0).fit(problem.train)
    except (UnsupportedError, IndefiniteHessianError) as error:
        pytest.skip(str(error))
    answers = {}
    for question in QUESTIONS:
        try:
            answers[question] = getattr(fitted, question)(queries)
        except (AttributeError, UnsupportedError):
            continue
    answers["probs"] = fitted.predict(queries).probs
    assert {question: answer.dtype for question, answer in answers.items()} == dict.fromkeys(answers, torch.float32)
    assert all(bool(torch.isfinite(answer).all()) for answer in answers.values())
    if "joint_covariance" in answers:  # between the rows, whose diagonal blocks are the covariances of single rows
        blocks = torch.stack([answers["joint_covariance"][i, :, i] for i in range(len(queries))])
        assert torch.allclose(blocks, answers["covariance"], rtol=1e-3, atol=1e-5 * float(blocks.abs().max()))
