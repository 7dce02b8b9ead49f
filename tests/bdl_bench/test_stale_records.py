"""A record is used again only if nothing that it depends on has changed: options, code, and what the code imports."""

import functools
import importlib
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from bdl_bench import compare
from bdl_bench.methods import METHODS, Method
from bdl_bench.methods.registry import OptionGrid, preset
from bdl_bench.problem import Problem
from bdl_bench.records import RecordStore
from bdl_bench.records.content_digests import content_digest
from bdl_bench.records.problem_digest import problem_digest
from bdl_bench.report.results import load_records
from bdl_bench.runner.grid import Grid
from bdl_bench.tasks import TASKS
from bdl_bench.tasks.registry import Task
from estimators import LastLayerLaplace, LinearizedLaplace
from estimators.likelihoods import Gaussian

ESTIMATOR = """
from estimators import LastLayerLaplace
from stale_helpers.scales import scaled

class Scaled(LastLayerLaplace):
    def _checked_variance(self, x):
        return scaled(super()._checked_variance(x))

def build(problem, seed):
    return Scaled(problem.model, problem.likelihood, prior_precision=problem.prior_precision)

def build_late(problem, seed):
    import stale_helpers.late
    return LastLayerLaplace(problem.model, problem.likelihood, prior_precision=stale_helpers.late.DELTA)
"""
PACKAGE = {
    "__init__.py": "",
    "scales.py": "from . import numbers\n\ndef scaled(variance):\n    return numbers.FACTOR * variance\n",
    "numbers.py": "FACTOR = 2.0\n",
    "late.py": "DELTA = 3.0\n",
}
TASK = """
import torch
from torch import nn
from bdl_bench import Problem
from stale_helpers.numbers import FACTOR

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        import stale_helpers.numbers
        return stale_helpers.numbers.FACTOR * self.layer(x)

def make(seed):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(20, 3, generator=g), torch.randn(20, 2, generator=g)
    torch.manual_seed(0)
    return Problem(Net().eval(), "regression", [(x, y)], [(x, y)], [(x, y)], prior_precision=1.0)
"""


def make_fixed(seed):
    """A trained regression with two outputs."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(20, 3, generator=g), torch.randn(20, 2, generator=g)
    batches = [(x[:13], y[:13]), (x[13:], y[13:])]
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).eval()
    return Problem(model, "regression", batches, batches, batches, prior_precision=0.5)


class Modules:
    """Modules of the user's in a folder, edited and imported again as a new process would."""

    def __init__(self, folder):
        self.folder, self.edits = folder, 0
        (folder / "stale_helpers").mkdir()
        for name, text in PACKAGE.items():
            (folder / "stale_helpers" / name).write_text(text)
        (folder / "stale_estimator.py").write_text(ESTIMATOR)
        (folder / "stale_task.py").write_text(TASK)

    def edit(self, name, old, new):
        path = self.folder / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
        self.edits += 1
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime + self.edits))  # or the old bytecode is taken

    def forget(self):
        for name in [name for name in sys.modules if name.startswith("stale_")]:
            del sys.modules[name]
        importlib.invalidate_caches()

    def load(self, name):
        self.forget()
        return importlib.import_module(name)


@pytest.fixture
def modules(tmp_path, monkeypatch):
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    found = Modules(folder)
    yield found
    found.forget()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(build) -> whether the method "mine" was taken from the records, and its variances."""
    monkeypatch.setitem(TASKS, "fixed", Task("fixed", "fixed", make_fixed))

    def once(build, axis=None):
        monkeypatch.setitem(METHODS, "mine", Method("mine", "my own", build, tuned_option=axis))
        statuses = {}
        grid = Grid(["fixed"], ["mine"], [0], tmp_path / "out")
        (record,) = grid.run(lambda event: statuses.update({event.method: event.status}))
        assert record.status == "ok", record.reason
        return statuses["mine"] == "cached", RecordStore(tmp_path / "out").arrays(record)["epistemic_variance"]

    return once


@pytest.mark.parametrize(
    ("attribute", "name", "old", "new", "factor"),
    [
        (
            "build",
            "stale_estimator.py",
            "scaled(super()._checked_variance(x))",
            "3 * scaled(super()._checked_variance(x))",
            3,
        ),
        ("build", "stale_helpers/scales.py", "numbers.FACTOR * variance", "5 * numbers.FACTOR * variance", 5),
        ("build", "stale_helpers/numbers.py", "2.0", "6.0", 3),
        ("build_late", "stale_helpers/late.py", "3.0", "4.0", None),
    ],
)
def test_an_edited_module_that_a_method_imports_gives_fresh_numbers(attribute, name, old, new, factor, modules, run):
    _, before = run(getattr(modules.load("stale_estimator"), attribute))
    assert run(getattr(modules.load("stale_estimator"), attribute))[0]
    modules.edit(name, old, new)
    is_cached, after = run(getattr(modules.load("stale_estimator"), attribute))
    assert not is_cached
    if factor is not None:
        assert after == pytest.approx(factor * before, rel=1e-5)
    assert (after != before).all()


def test_an_edit_that_is_not_imported_yet_does_not_make_old_numbers_valid_for_the_new_file(modules, run):
    build = modules.load("stale_estimator").build
    modules.edit("stale_helpers/numbers.py", "2.0", "6.0")
    modules.edit("stale_helpers/scales.py", "numbers.FACTOR * variance", "1 * numbers.FACTOR * variance")
    _, old = run(build)
    is_cached, new = run(modules.load("stale_estimator").build)
    assert not is_cached
    assert new == pytest.approx(3 * old, rel=1e-5)


@pytest.mark.parametrize("name", ["stale_task.py", "stale_helpers/numbers.py"])
def test_an_edited_module_that_a_task_imports_gives_fresh_numbers(name, modules, tmp_path):
    def once():
        modules.forget()
        (record,) = Grid(["stale_task:make"], ["map"], [0], tmp_path / "out").run(lambda _: None)
        return record.key, RecordStore(tmp_path / "out").arrays(record)["mean"]

    (key, before), (same, _) = once(), once()
    assert key == same
    old, new = ("= 2.0", "= 4.0") if name.endswith("numbers.py") else ("return stale", "return 2 * stale")
    modules.edit(name, old, new)
    other, after = once()
    assert other != key
    assert after == pytest.approx(2 * before, rel=1e-5)


def clone_with(**options):
    return preset(LinearizedLaplace, **options)


@dataclass
class Options:
    scale: float
    table: torch.Tensor


def build_with(options):
    def build(problem, seed):  # noqa: ARG001
        delta = problem.prior_precision * options.scale * float(options.table.mean())
        return LastLayerLaplace(problem.model, problem.likelihood, prior_precision=delta)

    return build


def long_table(middle):
    table = torch.ones(5000)
    table[2500] = middle
    return table


def with_factor(problem, seed, factor):  # noqa: ARG001
    delta = factor * problem.prior_precision
    return LastLayerLaplace(problem.model, problem.likelihood, prior_precision=delta)


def with_default(value):
    return lambda problem, seed, factor=value: with_factor(problem, seed, factor)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (clone_with(hessian_structure="full"), clone_with(hessian_structure="diag")),
        (build_with(Options(1.0, torch.ones(3))), build_with(Options(2.0, torch.ones(3)))),
        (build_with(Options(1.0, long_table(1.0))), build_with(Options(1.0, long_table(9000.0)))),
        (with_default(1.0), with_default(2.0)),
        (lambda p, s: preset(LastLayerLaplace)(p, s + 1), lambda p, s: preset(LastLayerLaplace)(p, s + 2)),
        (functools.partial(with_factor, factor=1.0), functools.partial(with_factor, factor=3.0)),
    ],
    ids=["preset", "dataclass", "long tensor", "default of a lambda", "lambda", "partial"],
)
def test_other_options_of_a_method_of_the_same_name_give_fresh_numbers(before, after, run):
    assert not run(before)[0]
    assert run(before)[0]
    assert not run(after)[0]


def test_another_tuned_option_of_a_method_gives_fresh_numbers(run):
    build = clone_with(hessian_structure="diag")
    near, far = (
        OptionGrid("prior_precision", lambda p, n, top=top: [p.prior_precision, top][:n]) for top in (2.0, 9.0)
    )
    assert not run(build, near)[0]
    assert run(build, near)[0]
    assert not run(build, far)[0]
    assert not run(build)[0]


def test_another_constant_of_a_preset_is_another_option(monkeypatch):
    before = {name: content_digest(method.build) for name, method in METHODS.items()}
    monkeypatch.setattr("bdl_bench.methods.regvar._DRAWS", 8)
    after = {name: content_digest(method.build) for name, method in METHODS.items()}
    assert {name for name in before if before[name] != after[name]} == {
        "regvar-finetune",
        "regvar",
        "regvar-param-probes",
    }


CELL = """
FACTOR = {factor}

def helper(variance):
    return FACTOR * variance

class Mine(LastLayerLaplace):
    def _checked_variance(self, x):
        return helper(super()._checked_variance(x))

build = lambda problem, seed: Mine(problem.model, problem.likelihood, prior_precision=1.0)
"""


def notebook(factor, name="__main__"):
    namespace = {"__name__": name, "LastLayerLaplace": LastLayerLaplace}
    exec(CELL.format(factor=factor), namespace)
    return namespace["build"]


@pytest.mark.parametrize("name", ["__main__", "a_module_without_a_file", None])
def test_what_a_notebook_defines_counts_by_its_code_and_by_the_globals_that_it_reads(name, run):
    _, before = run(notebook(2.0, name))
    assert run(notebook(2.0, name))[0]
    is_cached, after = run(notebook(4.0, name))
    assert not is_cached
    assert after == pytest.approx(2 * before, rel=1e-6)


class Gained(nn.Module):
    """A network with an option that neither its weights nor its text show."""

    def __init__(self, gain):
        super().__init__()
        self.layer, self.gain = nn.Linear(3, 2), gain
        self.register_buffer("shift", torch.zeros(1), persistent=False)
        self.layer.register_forward_hook(lambda module, inputs, output: self.gain * output)  # noqa: ARG005

    def forward(self, x):
        return self.layer(x) + self.shift


def gained(gain, shift=0.0, sigma=1.0):
    torch.manual_seed(0)
    model = Gained(gain).double().eval()
    model.shift += shift
    x, y = torch.arange(30.0).double().reshape(10, 3), torch.zeros(10, 2).double()
    likelihood = Gaussian(sigma_noise=torch.full((2,), sigma, dtype=torch.float64))
    return Problem(model, likelihood, [(x, y)], [(x, y)], [(x, y)], prior_precision=0.5)


def test_options_of_a_network_and_of_a_likelihood_count_by_value():
    base = problem_digest(gained(1.0))
    assert problem_digest(gained(1.0)) == base
    others = {problem_digest(p) for p in (gained(2.0), gained(1.0, shift=1.0), gained(1.0, sigma=1.0 + 1e-12))}
    assert len(others | {base}) == 4


def test_records_of_older_code_are_not_mixed_into_the_mean_over_seeds(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "fixed", Task("fixed", "fixed", make_fixed))
    for structure, seeds in (("full", [0, 1]), ("diag", [0])):
        mine = replace(METHODS["laplace"], name="mine", build=clone_with(hessian_structure=structure))
        monkeypatch.setitem(METHODS, "mine", mine)
        Grid(["fixed"], ["mine"], seeds, tmp_path).run(lambda _: None)
    found = {r.seed: (r.status, r.reason or "") for r in load_records(RecordStore(tmp_path))}
    assert found[0][0] == "ok"
    assert found[1][0] == "failed"
    assert "other code or options of its method" in found[1][1]


def digest_of_many():
    """Of the user's modules, of a set, and of all presets."""
    import stale_estimator
    import stale_task

    own = [stale_estimator.build, stale_estimator.build_late, stale_task.make, {"a", "b", "c"}, stale_task.Net]
    return content_digest(*own, *[(method.build, method.tuned_option) for method in METHODS.values()])


def write_digest(folder, path):
    """Run by a process of its own."""
    sys.path.insert(0, folder)
    Path(path).write_text(f"{digest_of_many()} {hash('a')}")


def test_a_digest_is_the_same_in_every_process(modules, fork_server, tmp_path):
    assert fork_server.run(write_digest, str(modules.folder), str(tmp_path / "digest")) == 0
    digest, hash_there = (tmp_path / "digest").read_text().split()
    assert int(hash_there) != hash("a")
    assert digest == digest_of_many()


class Node:
    def __init__(self):
        self.itself = self


@pytest.mark.parametrize(
    "things",
    [
        (1, 1.0, True, "1", b"1", None),
        ([1, 2], (1, 2), {1, 2}, {1: 2}, {2: 1}),
        (torch.ones(2), torch.ones(2).double(), torch.ones(1, 2), torch.tensor([1.0, -0.0]), torch.tensor([1.0, 0.0])),
        (Options(1.0, torch.ones(2)), Options(1.0, torch.zeros(2)), Options(2.0, torch.ones(2))),
        (lambda: 1, lambda: 2, lambda x=1: 1, lambda x=2: 1),  # noqa: ARG005
        (torch.float32, torch.float64, torch.device("cpu"), range(3), range(4)),
        (nn.Dropout(0.1), nn.Dropout(0.2)),
        (Node(), Options),
    ],
)
def test_different_things_have_different_digests_and_the_same_thing_the_same(things):
    assert len({content_digest(thing) for thing in things}) == len(things)
    assert [content_digest(thing) for thing in things] == [content_digest(thing) for thing in things]


def frame_of(found):
    return {(r.task, r.method): r.metrics["reg/NLL"] for r in found.records}


def options():
    return {"methods": ["map"], "seeds": 1, "progress_bar": False}


def test_two_problems_into_one_directory_stay_two(tmp_path):
    problems = [make_fixed(3), make_fixed(4)]
    first, second = (compare(problem, out=tmp_path, **options()) for problem in problems)
    assert frame_of(first).keys() == {("problem", "map")}
    assert frame_of(second).keys() == {("problem-2", "map")}
    assert frame_of(first) != frame_of(second)
    assert frame_of(compare(problems[0], out=tmp_path, **options())) == frame_of(first)
    assert first.to_frame().value.tolist() == compare(problems[0], out=tmp_path, **options()).to_frame().value.tolist()
    assert len(RecordStore(tmp_path).all()) == 2


def test_two_lambdas_into_one_directory_stay_two(tmp_path):
    found = [compare(lambda seed, k=k: make_fixed(seed + k), out=tmp_path, **options()) for k in (1, 2)]
    assert [list(frame_of(f)) for f in found] == [[("<lambda>", "map")], [("<lambda>-2", "map")]]
    assert len({tuple(frame_of(f).values()) for f in found}) == 2


def factory(k):
    def make_problem(seed):
        return make_fixed(seed + k)

    return make_problem


def test_two_factories_of_one_name_stay_two_and_each_is_resumed(tmp_path):
    names = [next(iter(frame_of(compare(factory(k), out=tmp_path, **options()))))[0] for k in (1, 2, 1, 2)]
    assert names == ["make_problem", "make_problem-2", "make_problem", "make_problem-2"]


def test_a_function_that_is_edited_keeps_its_name_and_gives_fresh_numbers(tmp_path):
    def defined(offset):
        namespace = {"__name__": "__main__", "make_fixed": make_fixed}
        exec(f"def mine(seed):\n    return make_fixed(seed + {offset})", namespace)
        return namespace["mine"]

    first = compare(defined(1), out=tmp_path, **options())
    second = compare(defined(2), out=tmp_path, **options())
    assert frame_of(first).keys() == frame_of(second).keys() == {("mine", "map")}
    assert frame_of(first) != frame_of(second)


def test_a_problem_named_like_a_bundled_task_does_not_replace_it(tmp_path):
    def digits(seed):
        return make_fixed(seed)

    bundled = TASKS["digits"]
    assert frame_of(compare(digits, out=tmp_path, **options())).keys() == {("digits-2", "map")}
    assert TASKS["digits"] is bundled
