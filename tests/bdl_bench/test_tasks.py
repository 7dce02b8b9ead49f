"""The bundled tasks: as large as they say, standardised on train alone, and one problem a seed."""

import pytest
import torch

from bdl_bench.fingerprints import problem_digest
from bdl_bench.problem import rows
from bdl_bench.tasks import TASKS, from_reference, resolve_task
from estimators.errors import OptionError


def all_rows(loader):
    batches = list(rows(loader))
    return torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches])


@pytest.mark.parametrize(
    ("name", "parameters", "sizes"), [("diabetes", 601, (300, 42, 100)), ("digits", 2410, (1000, 297, 500))]
)
def test_a_task_has_the_sizes_that_it_states(name, parameters, sizes):
    problem = TASKS[name].problem(0)
    assert problem.n_parameters == parameters
    assert tuple(len(all_rows(p)[1]) for p in (problem.train, problem.validation, problem.test)) == sizes


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_seed_determines_the_problem(name):
    assert problem_digest(TASKS[name].problem(1)) == problem_digest(TASKS[name].problem(1))
    assert problem_digest(TASKS[name].problem(1)) != problem_digest(TASKS[name].problem(2))


@pytest.mark.parametrize("name", sorted(TASKS))
def test_making_a_problem_leaves_the_random_state_alone(name):
    before = torch.get_rng_state()
    TASKS[name].problem(3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", sorted(TASKS))
def test_no_row_is_in_two_parts(name):
    problem = TASKS[name].problem(0)
    parts = [
        {row.numpy().tobytes() for row in all_rows(p)[0]} for p in (problem.train, problem.validation, problem.test)
    ]
    assert not parts[0] & parts[1]
    assert not (parts[0] | parts[1]) & parts[2]


def test_diabetes_is_standardised_by_its_training_rows():
    x, y = all_rows(TASKS["diabetes"].problem(0).train)
    for values in (x, y):
        assert torch.allclose(values.mean(0), torch.zeros(values.shape[1], dtype=values.dtype), atol=1e-12)
        assert torch.allclose(values.std(0), torch.ones(values.shape[1], dtype=values.dtype), atol=1e-12)


@pytest.mark.parametrize("reference", ["nowhere:make", "json:nothing", "json:", ":make", "bdl_bench:__all__"])
def test_a_reference_that_leads_nowhere_is_refused(reference):
    with pytest.raises(OptionError, match=r"module:factory|importable|function"):
        from_reference(reference)


def test_an_unknown_task_is_refused_with_the_list_of_known_ones():
    with pytest.raises(OptionError, match="diabetes, digits"):
        resolve_task("mnist")


def test_a_factory_that_returns_something_else_is_refused():
    with pytest.raises(OptionError, match="a str"):
        from_reference("builtins:str").problem(0)
