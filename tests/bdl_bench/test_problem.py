"""A problem is checked when it is made, and says what is wrong with it."""

import pytest
import torch
from torch import nn

from bdl_bench import Problem
from bdl_bench.problem.queries import queries, rewind
from bdl_bench.records.problem_digest import problem_digest
from estimators.errors import DataError, ModelError, OptionError
from estimators.likelihoods import Gaussian
from estimators.training import Recipe

X, Y = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(6, 2)
BATCHES = [(X[:4], Y[:4]), (X[4:], Y[4:])]


def network(weight=0.5):
    model = nn.Linear(3, 2).eval()
    nn.init.constant_(model.weight, weight)
    nn.init.zeros_(model.bias)
    return model


def problem(**changes):
    arguments = {
        "model": network(), "likelihood": "regression", "train": BATCHES, "validation": BATCHES,
        "test": BATCHES, "prior_precision": 1.0, **changes,
    }  # fmt: skip
    return Problem(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "weights.pt"}, ModelError, "str"),
        ({"model": nn.Linear(3, 2)}, ModelError, "train mode"),
        ({"model": nn.Linear(4, 2).eval()}, DataError, "cannot be multiplied"),
        ({"likelihood": "poisson"}, OptionError, "poisson"),
        ({"train": iter(BATCHES)}, DataError, "list_iterator"),
        ({"test": []}, DataError, "empty"),
        ({"validation": [X]}, DataError, "Tensor"),
        ({"train": [(X, Y[:, 0])]}, DataError, r"\(6,\)"),
        ({"train": [(X, Y[:3])]}, DataError, r"\(3, 2\)"),
        ({"prior_precision": 0.0}, OptionError, "0.0"),
        ({"prior_precision": float("nan")}, OptionError, "nan"),
        ({"prior_precision": {}}, OptionError, "{}"),
    ],
)
def test_a_problem_that_cannot_work_is_rejected(changes, error, message):
    with pytest.raises(error, match=message):
        problem(**changes)


def test_a_network_to_be_trained_may_be_in_train_mode_and_stays_so():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    problem(model=model, recipe=Recipe(epochs=1))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_moving_a_problem_keeps_every_batch():
    moved = problem(shifts={"noisy": BATCHES}).on("cpu")
    assert [torch.equal(a[0], b[0]) for a, b in zip(moved.train, BATCHES, strict=True)] == [True, True]
    assert len(list(moved.shifts["noisy"])) == 2


def test_the_digest_ignores_the_order_of_rows_and_nothing_else():
    reordered = [(X[[5, 2]], Y[[5, 2]]), (X[[0, 4, 3, 1]], Y[[0, 4, 3, 1]])]
    changed = [(X, Y + 1e-6)]
    base = problem_digest(problem())
    assert problem_digest(problem(train=reordered)) == base
    others = [
        {"train": changed}, {"test": changed}, {"prior_precision": 2.0}, {"likelihood": Gaussian(sigma_noise=2.0)},
        {"model": network(weight=0.25)}, {"recipe": Recipe(epochs=3)},
    ]  # fmt: skip
    digests = {problem_digest(problem(**other)) for other in others}
    assert len(digests | {base}) == len(others) + 1


LINE = [torch.linspace(-1, 1, 5).unsqueeze(1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ood": {"far": [X[:, :2]]}}, "ood far.*cannot be multiplied"),
        ({"ood": {"far": []}}, "empty"),
        ({"ood": {"far": iter([X])}}, "ood far"),
        ({"shifts": {"noise-1": [X]}}, "Tensor"),
        ({"shifts": {"noise-1": [(X, Y[:3])]}}, r"shift noise-1.*\(3, 2\)"),
        ({"shifts": {"noise-1": [(X, Y[:, 0])]}}, r"shift noise-1.*\(6,\)"),
        ({"plot_grid": BATCHES}, r"ascending.*\(4, 3\)"),
    ],
)
def test_further_sets_that_cannot_work_are_rejected_by_name(changes, message):
    with pytest.raises(DataError, match=message):
        problem(**changes)


def one_input(**changes):
    batches, model = [(X[:, :1], Y)], nn.Linear(1, 2).eval()
    nn.init.constant_(model.weight, 0.5)
    nn.init.zeros_(model.bias)
    return problem(model=model, train=batches, validation=batches, test=batches, **changes)


def test_a_band_is_a_line_of_ascending_inputs():
    assert one_input(plot_grid=LINE).plot_grid is LINE
    with pytest.raises(DataError, match="ascending"):
        one_input(plot_grid=[LINE[0].flip(0)])


def test_a_band_moves_with_its_problem():
    moved = one_input(plot_grid=LINE, ood={"far": LINE}).on("cpu")
    assert torch.equal(next(queries(moved.plot_grid)).x, LINE[0])
    assert one_input().on("cpu").plot_grid is None


def test_queries_have_targets_where_the_loader_has():
    dicts = [{"ids": X, "labels": Y}, {"ids": X}]
    found = list(queries([(X, Y), X, *dicts]))
    assert [query.y is None for query in found] == [False, True, False, True]
    assert [len(query) for query in found] == [6, 6, 6, 6]
    assert [sorted(query.x) for query in found[2:]] == [["ids"], ["ids"]]


def test_the_digest_sees_further_sets():
    sets = [
        {},
        {"ood": {"far": LINE}},
        {"ood": {"away": LINE}},
        {"plot_grid": LINE},
        {"shifts": {"far": [(LINE[0], Y[:5])]}},
    ]
    assert len({problem_digest(one_input(**each)) for each in sets}) == len(sets)


def test_the_digest_sees_what_a_network_does_with_its_weights():
    def digest(activation, *, frozen=False):
        torch.random.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 2)).eval()
        model[0].requires_grad_(not frozen)
        return problem_digest(problem(model=model))

    assert digest(nn.Tanh()) == digest(nn.Tanh())
    assert len({digest(nn.Tanh()), digest(nn.ReLU()), digest(nn.Tanh(), frozen=True)}) == 3


def test_loaders_that_shuffle_begin_again_after_a_rewind():
    rows = torch.utils.data.TensorDataset(X, Y)
    loader = torch.utils.data.DataLoader(rows, 2, shuffle=True, generator=torch.Generator().manual_seed(1))
    made = problem(train=loader).on("cpu")
    rewind(made.sets().values())
    first = [x.clone() for x, _ in made.train]
    assert any(not torch.equal(a, b) for a, (b, _) in zip(first, made.train, strict=True))
    rewind(made.sets().values())
    assert all(torch.equal(a, b) for a, (b, _) in zip(first, made.train, strict=True))
