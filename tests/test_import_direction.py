"""Imports go one way: folders in the order of docs/architecture.md, no circle among folders or files."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import bdl_bench
import estimators

ROOT = Path(__file__).parents[1]
ORDER = {
    "estimators": (
        *(
            "errors",
            "option_checks",
            "numerics",
            "likelihoods",
            "runtime",
            "persistence",
            "models",
            "data",
            "objective",
        ),
        *(
            "training",
            "curvature",
            "calibration",
            "estimator",
            "laplace",
            "regvar",
            "sampling",
            "variational",
            "tuning",
            "testing",
            "baselines",
            "integrations",
        ),
        "diagnostics",
    ),
    "bdl_bench": (
        *(
            "markdown",
            "citation",
            "suggestions",
            "problem",
            "metrics",
            "data",
            "methods",
            "stats",
            "records",
            "verify",
            "decisions",
            "networks",
            "tasks",
            "plugins",
            "runner",
            "report",
            "reproduce",
        ),
        *("cli", "comparison"),
    ),
}
"""Folders (and the files beside them), lowest first. `__init__` and `__main__` of a package stand above them all."""

FORBIDDEN = {"estimators": {"bdl_bench", "benchmarks", "tests"}, "bdl_bench": {"benchmarks", "tests"}}

Files = Mapping[str, Path]
"""Files by the dotted name of their module; `__init__.py` by that of its folder."""


@dataclass(frozen=True)
class Arrow:
    """One import: the module whose file has it, and the module or package whose file it runs."""

    source: str
    target: str

    def __str__(self) -> str:
        return f"{self.source} imports {self.target}"


def files_of(package: Path) -> dict[str, Path]:
    """Every file of a package by the name of its module."""
    return {_name(path.relative_to(package.parent)): path for path in sorted(package.rglob("*.py"))}


def _name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def arrows(files: Files) -> list[Arrow]:
    """Every import of a file, wherever in the file it stands: in functions and under TYPE_CHECKING, too."""
    return [Arrow(name, target) for name, path in files.items() for target in _imported(name, path, files)]


def _imported(name: str, path: Path, files: Files) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(name, path, node)
            for alias in node.names:  # `from package import module` runs the file of the module
                yield inner if (inner := f"{module}.{alias.name}") in files else module


def _absolute(name: str, path: Path, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    return ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])


def forbidden(found: list[Arrow]) -> list[str]:
    """Imports of one package that the other must not have."""
    return [str(a) for a in found if _top(a.target) in FORBIDDEN[_top(a.source)]]


def upward(found: list[Arrow], order: Mapping[str, tuple[str, ...]] = ORDER) -> list[str]:
    """Imports within a package of what stands above the folder of the file."""
    inner = [a for a in found if _top(a.source) == _top(a.target)]
    return [str(a) for a in inner if _height(a.target, order) > _height(a.source, order)]


def _height(name: str, order: Mapping[str, tuple[str, ...]]) -> int:
    """The place of a module's folder in the order; a package's own `__init__` and `__main__` are above."""
    package, *inner = name.split(".")
    return order[package].index(inner[0]) if inner and inner[0] != "__main__" else len(order[package])


def _top(name: str) -> str:
    return name.partition(".")[0]


def circle(pairs: list[tuple[str, str]]) -> list[str]:
    """A circle among (importer, imported), [] if there is none."""
    following: dict[str, set[str]] = {}
    for source, target in pairs:
        if source != target:
            following.setdefault(source, set()).add(target)
    finished: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in finished:
            return []
        for target in sorted(following.get(node, ())):
            if found := visit(target, [*path, node]):
                return found
        finished.add(node)
        return []

    return next((found for node in sorted(following) if (found := visit(node, []))), [])


def circles(found: list[Arrow], files: Files) -> list[list[str]]:
    """A circle among files; among folders of the same folder, at every depth."""
    inner = [(a.source, a.target) for a in found if a.target in files]
    return [c for c in (circle(inner), *(circle(pairs) for pairs in _siblings(inner, files))) if c]


def _siblings(pairs: list[tuple[str, str]], files: Files) -> Iterator[list[tuple[str, str]]]:
    """Imports between folders that stand beside each other, once for each folder that has such."""
    folders = {name for name, path in files.items() if path.stem == "__init__"}
    for folder in sorted(folders):
        beside = [(_child(folder, source), _child(folder, target)) for source, target in pairs]
        yield [(a, b) for a, b in beside if a in folders and b in folders]


def _child(folder: str, name: str) -> str:
    """The folder or file directly in `folder` that has a module."""
    inner = name.removeprefix(f"{folder}.")
    return f"{folder}.{inner.partition('.')[0]}" if inner != name else ""


PACKAGES = {package.__name__: files_of(Path(str(package.__file__)).parent) for package in (estimators, bdl_bench)}
FILES = {name: path for files in PACKAGES.values() for name, path in files.items()}


def test_every_folder_has_its_place_in_the_order():
    for package, files in PACKAGES.items():
        found = {name.split(".")[1] for name in files if "." in name} - {"__main__"}
        assert found == set(ORDER[package])


def test_folders_import_only_what_stands_below_them():
    assert upward(arrows(FILES)) == []


def test_no_import_circle_among_files_or_folders():
    assert circles(arrows(FILES), FILES) == []


def test_packages_import_neither_what_depends_on_them_nor_tests():
    assert forbidden(arrows(FILES)) == []


def test_the_order_in_the_documentation_is_the_one_that_is_tested():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for package, order in ORDER.items():
        listed = text.partition(f"<!-- order of {package} -->\n")[2].partition("\n\n")[0]
        assert listed.replace("`", "").replace("\n", " ").split(" → ") == list(order)


# The checker is tested on packages that have one fault each.


def planted(folder: Path, sources: Mapping[str, str]) -> dict[str, Path]:
    """Files of a package called estimators; every folder of them is a package."""
    package = folder / "estimators"
    for name, source in sources.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        for parent in [p for p in path.parents if p.is_relative_to(package)]:
            (parent / "__init__.py").touch()
    return files_of(package)


def test_an_import_upwards_is_found_wherever_it_stands(tmp_path):
    for i, source in enumerate(
        [
            "from estimators.models.network import Network",
            "def f():\n    import estimators.models.network",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from estimators.models import network",
            "from ..models.network import Network",
            "from estimators import models",
            "from estimators import Gaussian",
        ]
    ):
        files = planted(tmp_path / str(i), {"numerics/dtype.py": source, "models/network.py": ""})
        assert len(upward(arrows(files))) == 1
    files = planted(
        tmp_path / "down", {"models/network.py": "import estimators.numerics.dtype", "numerics/dtype.py": ""}
    )
    assert upward(arrows(files)) == []


def test_a_circle_of_files_is_found(tmp_path):
    sources = {
        "models/a.py": "from estimators.models import b",
        "models/b.py": "from estimators.models.c import x",
        "models/c.py": "def f():\n    from estimators.models.a import y",
    }
    files = planted(tmp_path, sources)
    assert circles(arrows(files), files) == [[f"estimators.models.{name}" for name in "abca"]]
    assert upward(arrows(files)) == []


def test_a_circle_of_folders_without_a_circle_of_files_is_found(tmp_path):
    sources = {
        "curvature/dense/a.py": "import estimators.curvature.krylov.b",
        "curvature/krylov/b.py": "",
        "curvature/krylov/c.py": "import estimators.curvature.dense.d",
        "curvature/dense/d.py": "",
    }
    files = planted(tmp_path, sources)
    assert [set(found) for found in circles(arrows(files), files)] == [
        {"estimators.curvature.dense", "estimators.curvature.krylov"}
    ]


def test_an_import_of_what_depends_on_the_package_is_found(tmp_path):
    sources = {f"numerics/{name}.py": f"import {name}" for name in ("bdl_bench", "benchmarks", "tests")}
    assert len(forbidden(arrows(planted(tmp_path, sources)))) == 3
