"""Options by value: equal ones are equal in every process, any other value differs, and nothing is an address."""

import json
import threading
from collections import namedtuple
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from estimators import FineTune, Gaussian, LinearResponse, PosteriorDraws
from estimators.persistence.option_values import described, differences, in_words
from estimators.training import Recipe

SCALE = 3.0
LONG = torch.linspace(0.1, 2.0, 1200)


def text_of(value):
    """The description of a value as text, equal for equal values."""
    return json.dumps(described(value), sort_keys=True)


class Laplacian(Gaussian):
    """A likelihood of a user's own, with a value in a private attribute and none of `__repr__`'s."""

    def __init__(self, width, shape=1.0):
        super().__init__(0.5)
        self._width, self.shape = width, shape
        self.seen_ = []

    __repr__ = object.__repr__

    def nll(self, f, y):
        return (f - y).abs().sum(-1) / self._width * SCALE

    @cached_property
    def table(self):
        return torch.ones(3)


@dataclass
class Pair:
    left: object
    right: object = None


Named = namedtuple("Named", ["first", "second"])


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


class LikelihoodModule(nn.Module):
    def __init__(self, k):
        super().__init__()
        self.k, self.layer = k, nn.Identity()


def top_level(f):
    return f[..., 0] * SCALE


def closing_over(value):
    return lambda f: f * value


def looped():
    value = {"a": 1}
    value["self"] = value
    return value


EQUAL = [
    (1, 1.0, np.float32(1), np.int64(1), torch.tensor(1.0), torch.tensor(1)),
    (0.1, np.float32(0.1), torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64)),
    ([1, 2], (1.0, 2.0), torch.tensor([1, 2]), np.array([1.0, 2.0]), [np.float32(1), torch.tensor(2)]),
    ([[1, 2], [3, 4]], torch.tensor([[1.0, 2.0], [3.0, 4.0]]), np.array([(1, 2), (3, 4)])),
    (LONG, LONG.tolist(), LONG.double(), LONG.numpy(), tuple(LONG.tolist()), LONG.clone().requires_grad_()),
    (list(range(50)), range(50), torch.arange(50), torch.arange(50).float()),
    (["a.*", "b"], ("a.*", "b")),
    ({"a": 1, "b": [2, 3]}, {"a": 1.0, "b": (2.0, 3.0)}),
    ({3, 1, 2}, frozenset({1.0, 2, 3})),
    (lambda f: f[0], lambda f: f[0]),
    (closing_over(2), closing_over(2.0)),
    (partial(top_level, 1), partial(top_level, 1.0)),
    (Laplacian(2), Laplacian(2.0, torch.tensor(1.0))),
    (Gaussian(LONG), Gaussian(LONG.tolist())),
    (FineTune(1, seed=3), FineTune(1.0, seed=np.int64(3), vmap_chunk_size=7)),
    (FineTune(recipe=Recipe(lr=1)), FineTune(recipe=Recipe(lr=np.float32(1.0), micro_batch_size=5))),
    (float("nan"), np.float32("nan")),
    (True, np.True_),
    ([True, False], torch.tensor([True, False]), (np.True_, False)),
    ([True] * 40, torch.ones(40, dtype=torch.bool)),
    (torch.nn.functional.relu, torch.nn.functional.relu),
    (torch.compile(top_level), top_level),
    (Pair(1, None), Pair(1.0)),
]

CHANGED = LONG.clone()
CHANGED[600] += 1e-3
DIFFERENT = [
    (1, 2, "1", True, None, [1], 1.0000002, float("inf")),
    (2**53 + 1, 2**53, 2**62),
    (LONG, CHANGED, LONG[:-1], LONG[:, None], LONG.flip(0)),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1}),
    (torch.float16, torch.bfloat16, None),
    (lambda f: f[0], lambda f: f[1], lambda f: f[0] + 1, top_level, itemgetter(0), itemgetter(1)),
    (closing_over(2), closing_over(3), closing_over(LONG), closing_over(CHANGED)),
    (partial(top_level, 1), partial(top_level, 2), partial(torch.sum, 1)),
    (Laplacian(2), Laplacian(3), Laplacian(2, 1.5), Gaussian(0.5)),
    (Pair(1), Pair(2), Pair(1, 1), Named(1, None), (1, None)),
    (Slotted(1), Slotted(2)),
    (FineTune(), FineTune(seed=1), FineTune(0.1), FineTune(recipe=Recipe(lr=0.3)), LinearResponse()),
    (LinearResponse(1e-9), LinearResponse(1e-8), LinearResponse(1e-9, 7)),
    (PosteriorDraws(4), PosteriorDraws(4, seed=1), PosteriorDraws(4, variance_estimate="monte_carlo")),
    (torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)),
    (np.random.default_rng(1), np.random.default_rng(2)),
    (torch.nn.functional.relu, torch.relu, torch.tanh, "abc".join, "abd".join),
    (nn.Dropout(0.1), nn.Dropout(0.2), LikelihoodModule(1), LikelihoodModule(2)),
    (Path("a"), Path("b"), "a"),
    (b"1", b"2"),
]


@pytest.mark.parametrize("values", EQUAL, ids=range(len(EQUAL)))
def test_equal_values_have_one_description(values):
    descriptions = [described(value) for value in values]
    assert all(description == descriptions[0] for description in descriptions)
    assert len({text_of(value) for value in values}) == 1
    assert json.loads(json.dumps(descriptions[0])) == descriptions[0]


@pytest.mark.parametrize("values", DIFFERENT, ids=range(len(DIFFERENT)))
def test_other_values_have_other_descriptions(values):
    for one, other in combinations(values, 2):
        assert described(one) != described(other), (one, other)
        assert text_of(one) != text_of(other)


@pytest.mark.parametrize("value", [v for values in EQUAL + DIFFERENT for v in values[:1]])
def test_no_description_has_an_address(value):
    assert " at 0x" not in json.dumps(described(value)) + in_words(described(value))


def test_what_has_been_learned_or_cached_is_no_option():
    used = Laplacian(2)
    used.seen_.append(1)
    assert used.table.sum() == 3
    assert described(used) == described(Laplacian(2))


def test_what_no_pickle_can_keep_is_its_class():
    assert described(Pair(threading.Lock())) == described(Pair(threading.Lock()))
    assert "cycle" in json.dumps(described(looped()))


def test_other_code_under_the_same_name_differs():
    def make(exponent):
        class Own(Gaussian):
            def nll(self, f, y):
                return (f - y).abs().pow(exponent).sum(-1)

        return Own()

    class Own(Gaussian):
        def nll(self, f, y):
            return (f - y).square().sum(-1)

    assert described(make(2)) == described(make(2.0))
    assert described(make(2)) != described(make(3))
    assert described(make(2)) != described(Own())


def test_a_global_that_a_function_names_is_part_of_it(monkeypatch):
    before = [text_of(value) for value in (top_level, Laplacian(2))]
    monkeypatch.setitem(globals(), "SCALE", 4.0)
    assert all(text_of(value) != old for value, old in zip((top_level, Laplacian(2)), before, strict=True))


def test_differences_are_named_by_their_path():
    there, here = (described(FineTune(recipe=Recipe(lr=lr), seed=seed)) for lr, seed in ((0.1, 1), (0.2, 0)))
    assert differences(there, here, "solver") == [("solver.recipe.lr", "0.1", "0.2"), ("solver.seed", "1", "0")]
    assert differences(there, json.loads(json.dumps(there)), "solver") == []
    ((name, first, second),) = differences(described(Gaussian(LONG)), described(Gaussian(CHANGED)), "likelihood")
    assert name == "likelihood.sigma_noise"
    assert first != second


def texts():
    values = top_level, closing_over(2), Laplacian(2), EQUAL[9][0], FineTune(), {"b", "a", "c"}
    return [text_of(value) for value in (*values, lambda f: f in {"b", "a", "c"})]


def write_texts(path):
    """Run by a process of its own."""
    Path(path).write_text(json.dumps([texts(), hash("a")]))


def test_another_process_describes_the_same_values_alike(fork_server, tmp_path):
    """Hashes of strings differ between processes, and so does the order of sets."""
    path = tmp_path / "texts"
    assert fork_server.run(write_texts, str(path)) == 0
    found, hash_there = json.loads(path.read_text())
    assert hash_there != hash("a")
    assert found == texts()


def test_values_that_differ_behind_what_a_message_shows_are_told_apart():
    there, here = ({f"layer.{i}.weight": i + (i == 99) * extra for i in range(100)} for extra in (0, 1))
    ((_, first, second),) = differences(described(there), described(here), "prior_precision")
    assert first != second
    assert first[:100] == second[:100]
