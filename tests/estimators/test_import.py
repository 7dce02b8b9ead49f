"""Importing the library is light, and its own methods need torch, numpy and safetensors only."""

import json
import subprocess
import sys
import textwrap

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

DATA = """
import torch
from torch import nn

torch.manual_seed(0)
x, y = torch.randn(12, 3).double(), torch.randint(0, 3, (12,))
loader = list(zip(x.split(5), y.split(5)))
model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double().eval()
"""


def run(code):
    program = textwrap.dedent(code)
    return subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def loaded():
    answer = run("import estimators, sys; print(' '.join(sorted({name.partition('.')[0] for name in sys.modules})))")
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.split()


def test_the_library_is_loaded(loaded):
    assert "estimators" in loaded
    assert "torch" in loaded


@pytest.mark.parametrize("package", OPTIONAL)
def test_importing_the_library_does_not_load(package, loaded):
    assert package not in loaded


def test_every_public_name_is_there():
    assert sorted(estimators.__all__) == estimators.__all__
    for name in estimators.__all__:
        assert getattr(estimators, name).__doc__


def test_every_module_is_imported_without_the_optional_packages():
    code = """
    import importlib, pkgutil
    import estimators

    for module in pkgutil.walk_packages(estimators.__path__, "estimators."):
        importlib.import_module(module.name)
    """
    answer = run(WITHOUT_OPTIONAL + textwrap.dedent(code))
    assert answer.returncode == 0, answer.stderr


def test_the_blocked_packages_are_really_blocked():
    answer = run(WITHOUT_OPTIONAL + "import scipy")
    assert "ModuleNotFoundError: No module named 'scipy'" in answer.stderr


def test_own_methods_fit_and_predict_without_the_optional_packages():
    code = """
    import copy
    import warnings

    from estimators import (
        LastLayerLaplace,
        LinearizedLaplace,
        LinearResponse,
        NewtonRefit,
        Pointwise,
        RegVar,
        SplitConformal,
    )
    from estimators.baselines import DDU, MAP, SNGP, DeepEnsemble, GaussianProcess, GradientNorm, NTKGaussianProcess
    from estimators.errors import UncalibratedWarning
    from estimators.training import Recipe, train_map

    short, untrained = Recipe(epochs=2), copy.deepcopy(model)
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
        DeepEnsemble(model, "classification", members=[untrained], n_members=2),
        DDU(model, "classification"),
        SNGP(model, "classification", make_model=lambda: copy.deepcopy(untrained), recipe=short, n_features=8),
        GaussianProcess(model, "classification"),
        NTKGaussianProcess(model, "classification"),
    ]
    warnings.simplefilter("ignore", UncalibratedWarning)
    for estimator in fits:
        estimator.fit(loader)
        assert estimator.variance(x).shape == (12, 3)
        assert estimator.predict(x).probs.isfinite().all()
        assert SplitConformal(estimator).fit(loader).predict_set(x, 0.5).shape == (12, 3)
    print(len(fits))
    """
    answer = run(WITHOUT_OPTIONAL + DATA + textwrap.dedent(code))
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == "17\n"


NEEDS = [
    ("scipy", "tune(MAP(model, 'classification').fit(loader), loader)"),
    ("scipy", "TemperatureScaling(model, 'classification', validation=loader).fit(loader)"),
    ("rich", "train_map(model, 'classification', loader, prior_precision=1.0, recipe=short, progress_bar=True)"),
    ("baselines", "LaplaceTorch(model, 'classification').fit(loader)"),
]


@pytest.fixture(scope="module")
def messages():
    """What each of the calls says, all in one process."""
    imports = """
    import json
    from estimators import tune
    from estimators.baselines import MAP, LaplaceTorch, TemperatureScaling
    from estimators.errors import UnsupportedError
    from estimators.training import Recipe, train_map

    short, found = Recipe(epochs=1), {}
    """
    attempts = [
        f"try:\n    {code}\nexcept UnsupportedError as error:\n    found[{code!r}] = str(error)\n" for _, code in NEEDS
    ]
    answer = run(WITHOUT_OPTIONAL + DATA + textwrap.dedent(imports) + "".join(attempts) + "print(json.dumps(found))\n")
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


@pytest.mark.parametrize(("needs", "code"), NEEDS)
def test_what_needs_another_package_names_it(needs, code, messages):
    assert "pip install" in messages[code]
    assert needs in messages[code]
