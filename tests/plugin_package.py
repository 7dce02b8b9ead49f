"""A small plugin package outside of the repository, written into a folder: a method, a task, a metric and a section."""

import importlib
import os
import sys

NAME = "bdl_tiny_plugin"
FILES = {
    "pyproject.toml": f"""
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "bdl-tiny-plugin"
version = "1.2"

[project.entry-points."bdl_bench.plugins"]
tiny = "{NAME}"

[tool.setuptools]
packages = ["{NAME}"]
""",
    f"{NAME}/__init__.py": """
def register(registry):
    from bdl_tiny_plugin import methods, metrics, sections, tasks

    registry.add_method(methods.SCALED)
    registry.add_task(tasks.SMALL)
    registry.add_metric(metrics.MAE, "regression")
    registry.add_section("extremes", sections.extremes)
""",
    f"{NAME}/methods.py": """
from bdl_bench.methods import Method
from bdl_tiny_plugin.scale import FACTOR


class Scaled:
    def __init__(self, problem):
        self.model = problem.model

    def fit(self, train_loader):
        pass

    def variance(self, x):
        return FACTOR * x.square().sum(-1, keepdim=True).expand_as(self.model(x))


def build(problem, seed):
    return Scaled(problem)


SCALED = Method("tiny-scaled", "scaled squared norm of the inputs", build)
""",
    f"{NAME}/scale.py": "FACTOR = 2.0\n",
    f"{NAME}/tasks.py": '''
import torch
from torch import nn

from bdl_bench import Problem
from bdl_bench.tasks import Task


def make(seed):
    """A small linear regression."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(30, 3, generator=g), torch.randn(30, 1, generator=g)
    train, validation, test = ([(x[i::3], y[i::3])] for i in range(3))
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).eval()
    return Problem(model, "regression", train, validation, test, prior_precision=1.0)


SMALL = Task("tiny-task", "a small regression", make)
''',
    f"{NAME}/metrics.py": """
from bdl_bench.metrics import Metric


def absolute_error(arrays):
    return abs(arrays["mean"] - arrays["targets"]).mean(-1)


MAE = Metric("tiny/MAE", "MAE", "mean absolute error", "lower", scores=absolute_error)
""",
    f"{NAME}/sections.py": """
from matplotlib.figure import Figure

from bdl_bench.plugins import Section


def extremes(results):
    rows = []
    for method in results.methods:
        seed = results.shared_seeds(method, method)[0]
        rows.append([method, float(results.predictions(method, seed)["epistemic_variance"].max())])
    figure = Figure((2, 2))
    figure.add_subplot().plot([0, 1], [0, 1])
    return Section("Extreme variances", ["Largest <variance> of each method."], ["method", "largest"], rows,
                   {"A line": figure})
""",
}


def write_package(folder):
    """Write the project into a folder and return it."""
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.lstrip())
    return folder


def place_installed(site):
    """Write the package and its dist-info into a folder `site`, as an installation does."""
    write_package(site)
    info = site / "bdl_tiny_plugin-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bdl-tiny-plugin\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[bdl_bench.plugins]\ntiny = {NAME}\n")
    return site


def edit(path, old, new):
    """Replace text in a module whose bytecode must not be taken again."""
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime + 10))


def forget():
    """Forget the imported modules, as a new process would."""
    for name in [name for name in sys.modules if name.partition(".")[0] == NAME]:
        del sys.modules[name]
    importlib.invalidate_caches()
