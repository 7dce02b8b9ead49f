"""The bundled tasks: as large as they say, disjoint, standardised on train alone, one problem a seed, and learnable."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from bdl_bench.problem.queries import queries, rows
from bdl_bench.records.problem_digest import problem_digest
from bdl_bench.tasks import TASKS, from_reference, resolve_task
from bdl_bench.tasks.split import standardised
from estimators import LinearizedLaplace
from estimators.errors import OptionError
from estimators.numerics.pytrees import tensors_of
from estimators.training import train_map

OFFLINE = sorted(name for name, task in TASKS.items() if task.needs is None)
PUBLISHED = ["airfoil-bde", "bike-bde"]
"""Tasks with a published split, in which rows are repeated."""
SIZES = {
    "airfoil": (351, "regression", (1202, 150, 151)),
    "airfoil-gap": (351, "regression", (802, 100, 100)),
    "bike": (3251, "regression", (13902, 1738, 1737)),
    "concrete": (501, "regression", (804, 100, 101)),
    "concrete-active-learning": (501, "regression", (20, 100, 200)),
    "concrete-active-learning-power": (501, "regression", (20, 100, 200)),
    "concrete-interventions": (501, "regression", (400, 205, 400)),
    "concrete-optimisation": (501, "regression", (10, 100, 100)),
    "digits-active-learning": (2410, "classification", (20, 277, 500)),
    "digits-active-learning-power": (2410, "classification", (20, 277, 500)),
    "digits-interventions": (2410, "classification", (400, 397, 1000)),
    "breast-cancer": (513, "binary", (300, 119, 150)),
    "diabetes": (601, "regression", (300, 42, 100)),
    "diabetes-gap": (601, "regression", (206, 44, 44)),
    "digits": (2410, "classification", (1000, 297, 500)),
    "digits-cnn": (1946, "classification", (1000, 297, 500)),
    "digits-ood": (2344, "classification", (850, 250, 343)),
    "toy-gap": (151, "regression", (100, 40, 100)),
    "wine": (275, "classification", (90, 40, 48)),
}
SHIFTED = ["breast-cancer", "digits", "digits-cnn", "wine"]
STANDARDISED = ["airfoil", "airfoil-gap", "bike", "breast-cancer", "concrete", "diabetes", "diabetes-gap", "wine"]


def parts(problem):
    return problem.train, problem.validation, problem.test


def all_rows(loader):
    batches = list(rows(loader))
    return torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches])


def fingerprints(loader):
    return {row for query in queries(loader) for row in rows_in_bytes(tensors_of(query.x), len(query))}


def with_targets(loader):
    return {row for query in queries(loader) for row in rows_in_bytes([query.x, query.y], len(query))}


def rows_in_bytes(tensors, n):
    return [b"".join(t[i].numpy().tobytes() for t in tensors) for i in range(n)]


@functools.cache
def made(name, seed):
    """A problem that tests only read."""
    return TASKS[name].problem(seed)


@functools.cache
def trained(name):
    """The problem of seed 0, its network trained by the recipe."""
    problem, threads = TASKS[name].problem(0), torch.get_num_threads()
    torch.set_num_threads(1)  # small networks
    train_map(
        problem.model, problem.likelihood, problem.train, prior_precision=problem.prior_precision, recipe=problem.recipe
    )
    torch.set_num_threads(threads)
    return problem


def error(problem, loader):
    """RMSE, or the share of wrong classes."""
    x, y = all_rows(loader)
    with torch.no_grad():
        f = problem.model(x)
    if problem.likelihood.kind == "regression":
        return (f - y).square().mean().sqrt().item()
    return (((f > 0) != (y > 0.5)) if problem.likelihood.kind == "binary" else f.argmax(-1) != y).double().mean().item()


@pytest.mark.parametrize("name", sorted(SIZES))
def test_a_task_has_the_sizes_and_the_likelihood_that_it_states(name):
    problem = made(name, 0)
    sizes = tuple(len(all_rows(part)[1]) for part in parts(problem))
    assert (problem.n_parameters, problem.likelihood.kind, sizes) == SIZES[name]


@pytest.mark.parametrize("name", OFFLINE)
def test_a_seed_determines_the_problem(name):
    digest = problem_digest(made(name, 1))
    assert problem_digest(TASKS[name].problem(1)) == digest
    assert problem_digest(made(name, 0)) != digest


@pytest.mark.parametrize("name", OFFLINE)
def test_making_a_problem_leaves_the_random_state_alone(name):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    TASKS[name].problem(3)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", sorted(set(OFFLINE) - set(PUBLISHED)))
def test_no_row_is_in_two_parts_nor_out_of_distribution(name, seed):
    problem = made(name, seed)
    repeats_inputs = name.startswith(("bike", "concrete"))  # measured again, with another target
    bytes_of = with_targets if repeats_inputs else fingerprints
    pool = [] if problem.pool is None else [problem.pool]
    sets = [bytes_of(loader) for loader in (*parts(problem), *problem.ood.values(), *pool)]
    assert len(set().union(*sets)) == sum(map(len, sets))


@pytest.mark.parametrize("name", OFFLINE)
def test_the_network_of_a_method_that_trains_its_own_is_another_of_the_same_shape(name):
    problem = made(name, 0)
    fresh = problem.make_model()
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (problem.model, fresh)]
    assert shapes[0] == shapes[1]
    assert all(p is not q for p, q in zip(problem.model.parameters(), fresh.parameters(), strict=True))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", STANDARDISED)
def test_inputs_are_standardised_by_the_training_rows(name, seed):
    problem = made(name, seed)
    x, y = all_rows(problem.train)
    for values in (x, y) if problem.likelihood.kind == "regression" else (x,):
        assert torch.allclose(values.mean(0), torch.zeros(values.shape[1], dtype=values.dtype), atol=1e-12)
        assert torch.allclose(values.std(0), torch.ones(values.shape[1], dtype=values.dtype), atol=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", SHIFTED)
def test_a_shift_moves_the_rows_further_with_its_severity_and_keeps_their_targets(name, seed):
    problem = made(name, seed)
    x, y = all_rows(problem.test)
    families = {set_name.rpartition("-")[0] for set_name in problem.shifts}
    for family in families:
        distances = [0.0]
        for severity in range(1, 6):
            shifted, targets = all_rows(problem.shifts[f"{family}-{severity}"])
            assert torch.equal(targets, y[: len(targets)])
            distances.append((shifted - x[: len(shifted)]).flatten(1).norm(dim=1).mean().item())
        assert all(nearer < further for nearer, further in itertools.pairwise(distances)), family
    assert len(problem.shifts) == 5 * len(families)


def test_shifted_digits_stay_within_the_range_of_a_pixel():
    for loader in made("digits", 0).shifts.values():
        x, _ = all_rows(loader)
        assert x.min() >= 0
        assert x.max() <= 1


@pytest.mark.parametrize("seed", [0, 1])
def test_the_classes_held_out_are_in_no_part_and_all_out_of_distribution(seed):
    problem = made("digits-ood", seed)
    assert {int(label) for part in parts(problem) for label in all_rows(part)[1]} == set(range(8))
    pixels, classes = load_digits(return_X_y=True)
    expected = {row.tobytes() for row in pixels[classes >= 8] / 16}
    assert fingerprints(problem.ood["held-out"]) == expected
    assert all(query.y is None for query in queries(problem.ood["held-out"]))


@pytest.mark.parametrize(("seed", "column"), [(0, 0), (1, 2), (8, 9), (9, 0)])
def test_the_gap_of_diabetes_is_the_middle_third_of_one_measurement(seed, column):
    problem = made("diabetes-gap", seed)
    gap, _ = all_rows(problem.ood["gap"])
    outer = torch.cat([all_rows(part)[0] for part in parts(problem)])[:, column]
    low, high = gap[:, column].min(), gap[:, column].max()
    assert ((outer <= low) | (outer >= high)).all()
    assert (outer <= low).sum() >= 147
    assert (outer >= high).sum() >= 147
    assert len(gap) == 148


def test_the_toy_has_no_row_in_its_gap_and_a_band_across_it():
    problem = made("toy-gap", 0)
    outer = torch.cat([all_rows(part)[0] for part in parts(problem)])
    gap, _ = all_rows(problem.ood["gap"])
    (line,) = rows(problem.plot_grid)
    assert ((outer <= -0.7) | (outer >= 0.5)).all()
    assert ((gap > -0.7) & (gap < 0.5)).all()
    assert line.x.min() < outer.min() < outer.max() < line.x.max()
    assert torch.equal(line.y, torch.cos(4 * line.x + 0.8))


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("breast-cancer", 0.12), ("digits", 0.1), ("digits-cnn", 0.1), ("digits-ood", 0.1), ("wine", 0.15),
        ("diabetes", 1.0), ("diabetes-gap", 1.2), ("toy-gap", 0.2),
        ("airfoil", 0.5), ("airfoil-gap", 0.5), ("bike", 0.4), ("concrete", 0.5), ("concrete-interventions", 0.6),
        ("digits-interventions", 0.15),
    ],
)  # fmt: skip
def test_a_trained_network_is_right_on_test_rows(name, most):
    problem = trained(name)
    assert not problem.model.training
    assert error(problem, problem.test) < most


@pytest.mark.parametrize("name", sorted(SIZES))
def test_outputs_are_finite_everywhere(name):
    problem = trained(name)
    plot_grid = [] if problem.plot_grid is None else [problem.plot_grid]
    for loader in (*parts(problem), *problem.ood.values(), *problem.shifts.values(), *plot_grid):
        for query in queries(loader):
            assert torch.isfinite(problem.model(query.x)).all()


@pytest.mark.parametrize("name", ["breast-cancer", "digits", "digits-cnn"])
def test_the_worst_noise_costs_more_than_the_least(name):
    problem = trained(name)
    assert error(problem, problem.shifts["noise-5"]) > error(problem, problem.shifts["noise-1"]) + 0.02


def test_the_toy_is_wrong_in_its_gap_and_exact_laplace_is_unsure_there():
    problem = trained("toy-gap")
    assert error(problem, problem.ood["gap"]) > 1.5 * error(problem, problem.test)
    laplace = LinearizedLaplace(problem.model, problem.likelihood, prior_precision=problem.prior_precision)
    laplace.fit(problem.train)
    inside, outside = (laplace.variance(all_rows(loader)[0]).mean() for loader in (problem.ood["gap"], problem.test))
    assert inside > 20 * outside


def test_the_default_tasks_are_few_and_need_nothing():
    default = {name for name, task in TASKS.items() if task.default}
    assert {"diabetes", "digits"} <= default
    assert all(TASKS[name].needs is None for name in default)


def test_a_task_says_what_it_is_and_what_it_needs():
    assert all(task.summary for task in TASKS.values())
    assert "2.9 GB" in TASKS["cifar10"].needs
    assert "UCI" in TASKS["uci-concrete-gap"].needs


def test_a_task_says_whether_its_data_are_real_and_where_they_are():
    found = {
        name: TASKS[name].data for name in ("bike", "toy-gap", "mnist-5k", "r8", "uci-yacht", "uci-kin8nm", "cifar10")
    }
    assert found == {
        "bike": "real, ships",
        "toy-gap": "simulated, ships",
        "mnist-5k": "real, extra",
        "r8": "real, extra",
        "uci-yacht": "real, --data-dir",
        "uci-kin8nm": "simulated, --data-dir",
        "cifar10": "real, --data-dir",
    }


@pytest.mark.parametrize(("name", "published"), [("airfoil-bde", 0.6598), ("bike-bde", 0.7796)])
def test_a_linear_model_has_the_published_error_on_the_split_of_bde(name, published):
    """Arvanitis et al. (2025), whose linear model is fitted to all rows outside the test rows."""
    problem = made(name, 0)
    (x, y), (held_out_x, held_out_y), (test_x, test_y) = (all_rows(part) for part in parts(problem))
    x, y = torch.cat([x, held_out_x]), torch.cat([y, held_out_y])
    shift, scale = y.mean(), y.std(correction=0)
    with_ones = [torch.cat([rows_of, torch.ones(len(rows_of), 1).double()], 1) for rows_of in (x, test_x)]
    weights = torch.linalg.lstsq(with_ones[0], (y - shift) / scale).solution
    error_of_test = (with_ones[1] @ weights - (test_y - shift) / scale).square().mean().sqrt().item()
    assert error_of_test == pytest.approx(published, abs=1e-4)


def test_a_shipped_table_is_in_the_unit_of_its_target():
    problem = made("concrete", 0)
    _, y = all_rows(problem.test)
    mega_pascal = problem.likelihood.target_shift + problem.likelihood.target_scale * y
    assert 2 < mega_pascal.min() < mega_pascal.max() < 83  # of all rows 2.33 to 82.6


@pytest.mark.parametrize("reference", ["nowhere:make", "json:nothing", "json:", ":make", "bdl_bench:__all__"])
def test_a_reference_that_leads_nowhere_is_rejected(reference):
    with pytest.raises(OptionError, match=r"module:factory|importable|function"):
        from_reference(reference)


def test_an_unknown_task_is_rejected_with_the_list_of_known_ones():
    with pytest.raises(OptionError, match="diabetes, diabetes-gap, digits"):
        resolve_task("imagenet")


def test_a_factory_that_returns_something_else_is_rejected():
    with pytest.raises(OptionError, match="a str"):
        from_reference("builtins:str").problem(0)


def test_a_constant_column_is_standardised_to_zero():
    values = torch.tensor([[1.0, 5.0], [3.0, 5.0], [9.0, 5.0]])
    result = standardised(values, np.array([0, 1]))
    assert torch.allclose(result, torch.tensor([[-1.0, 0.0], [1.0, 0.0], [7.0, 0.0]]) / math.sqrt(2))
