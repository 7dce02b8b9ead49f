"""Importing the library is light, and its own methods need torch, numpy and safetensors only."""

import json
import subprocess
import sys

import pytest

import estimators

OPTIONAL = [
    *("scipy", "sklearn", "scoringrules", "typer", "rich", "pydantic", "jinja2", "matplotlib", "filelock", "pooch"),
    *("laplace", "backpack", "curvlinops", "torchvision", "pandas", "pyarrow"),
    *("transformers", "accelerate", "peft", "datasets", "ray", "bdl_bench"),
]

WITHOUT_OPTIONAL = f"""
import sys
from importlib.machinery import PathFinder


class OnlyTheHardNeeds(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {OPTIONAL!r} else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = OnlyTheHardNeeds
"""

SETUP = """
import copy, importlib, pkgutil
import torch
from torch import nn
import estimators
from estimators import LastLayerLaplace, LinearizedLaplace, LinearResponse, NewtonRefit, Pointwise, RegVar, tune
from estimators.baselines import MAP, DeepEnsemble, GradientNorm, LaplaceTorch, TemperatureScaling
from estimators.errors import UnsupportedError
from estimators.training import Recipe, train_map

torch.manual_seed(0)
short = Recipe(epochs=2)
x, y = torch.randn(12, 3).double(), torch.randint(0, 3, (12,))
loader = list(zip(x.split(5), y.split(5)))
model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double().eval()
"""

EVERY_MODULE = """
for module in pkgutil.walk_packages(estimators.__path__, "estimators."):
    importlib.import_module(module.name)
"""

OWN_METHODS = """
untrained = copy.deepcopy(model)
train_map(model, "classification", loader, prior_precision=1.0, recipe=short)
fits = [
    *(LinearizedLaplace(model, "classification", hessian_structure=s) for s in ("full", "kron", "ekfac", "diag")),
    *(LinearizedLaplace(model, "classification", inverse=i) for i in ("dual", "cg")),
    LinearizedLaplace(model, "classification", hessian_structure="lowrank", rank=5),
    LastLayerLaplace(model, "classification"),
    RegVar(model, "classification", solver=LinearResponse()),
    RegVar(model, "classification", regularizer=Pointwise(), solver=NewtonRefit()),
    MAP(model, "classification"),
    GradientNorm(model, "classification"),
    DeepEnsemble(model, "classification", trained_members=[untrained], n_members=2),
]
for estimator in fits:
    estimator.fit(loader)
    assert estimator.variance(x).shape == (12, 3)
    assert estimator.predict(x).probs.isfinite().all()
print(len(fits))
"""

NEEDS = {
    "tune(MAP(model, 'classification').fit(loader), loader)": "scipy",
    "TemperatureScaling(model, 'classification', validation=loader).fit(loader)": "scipy",
    "train_map(model, 'classification', loader, prior_precision=1.0, recipe=short, progress_bar=True)": "rich",
    "LaplaceTorch(model, 'classification').fit(loader)": "baselines",
}

ONE_BY_ONE = """
import contextlib, io, json, sys, traceback

answers = {}
for code in CODES:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            exec(SETUP + code, {})
            error = None
        except Exception as raised:
            error = [type(raised).__name__, str(raised), traceback.format_exc()]
    answers[code] = printed.getvalue(), error
print(json.dumps(answers))
"""

LOADED = """
import sys

def packages():
    return sorted({name.partition(".")[0] for name in sys.modules})

import estimators
library = packages()
import estimators.baselines
print(json.dumps([library, packages()]))
"""


def run(code):
    """What a new process prints, as JSON."""
    answer = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


@pytest.fixture(scope="module")
def loaded():
    """The packages after an import of the library, and after one of the baselines."""
    return run("import json" + LOADED)


@pytest.fixture(scope="module")
def answers():
    """For each piece of code what it prints and its error, in one process without the optional packages."""
    codes = ["import scipy", EVERY_MODULE, OWN_METHODS, *NEEDS]
    return run(f"{WITHOUT_OPTIONAL}\nSETUP, CODES = {SETUP!r}, {codes!r}\n{ONE_BY_ONE}")


def test_the_library_is_loaded(loaded):
    assert {"estimators", "torch"} <= set(loaded[0])


@pytest.mark.parametrize("package", OPTIONAL)
def test_importing_the_library_and_its_baselines_does_not_load(package, loaded):
    assert package not in loaded[0]
    assert package not in loaded[1]


def test_every_public_name_is_there():
    assert sorted(estimators.__all__) == estimators.__all__
    for name in estimators.__all__:
        assert getattr(estimators, name).__doc__


def test_the_blocked_packages_are_really_blocked(answers):
    assert answers["import scipy"][1][:2] == ["ModuleNotFoundError", "No module named 'scipy'"]


def test_every_module_is_imported_without_the_optional_packages(answers):
    assert answers[EVERY_MODULE] == ["", None]


def test_own_methods_fit_and_predict_without_the_optional_packages(answers):
    assert answers[OWN_METHODS] == ["13\n", None]


@pytest.mark.parametrize(("code", "needs"), NEEDS.items())
def test_what_needs_another_package_names_it(code, needs, answers):
    name, message, _ = answers[code][1]
    assert name == "UnsupportedError"
    assert "pip install" in message
    assert needs in message
