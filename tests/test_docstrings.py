"""Docstrings of the public API: each has the sections that a reference page needs, and every example runs.

Public are the classes and functions in `__all__` of the packages and subpackages, with their public
methods and properties.
"""

import ast
import dataclasses
import doctest
import enum
import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import estimators
import estimators.errors

PACKAGES = ("estimators", "bdl_bench")
ROOT = Path(__file__).parents[1]

CONSTRUCTED = {
    *estimators.__all__,
    "BatchEnsemble",
    "ConvergenceCriteria",
    "DeepEnsemble",
    "GradientNorm",
    "LaplaceTorch",
    "LoRAEnsemble",
    "MAP",
    "MCDropout",
    "MeanAbsoluteTraining",
    "MultiHeadEnsemble",
    "Problem",
    "Recipe",
    "RegularizedPair",
    "SWAG",
    "SbcCase",
    "TFB",
    "SubnetworkLaplace",
    "TemperatureScaling",
}
"""Classes that users construct: these need an example. `Prediction` and abstract classes are only returned."""

SECTIONS = ("Args", "Attributes", "Example", "Raises", "Returns", "Yields")
LEANING = re.compile(r"(Of|Likewise|Its|Their|The same|By itself|As above|As before|See above|Ditto|And)\b")
"""First words of a docstring that only its neighbour explains."""
TYPED_ERRORS = {
    name
    for name, member in vars(estimators.errors).items()
    if isinstance(member, type) and issubclass(member, Exception) and not issubclass(member, Warning)
}


@dataclasses.dataclass(frozen=True)
class Definition:
    """One public class, function, method or property, with what a user sees of it."""

    name: str
    member: Any
    owner: type | None = None

    @property
    def docstring(self) -> str:
        """Docstring of the definition itself, not an inherited one."""
        return inspect.cleandoc(self._function.__doc__ or "")

    @property
    def _function(self) -> Any:
        if isinstance(self.member, property):
            return self.member.fget
        return getattr(self.member, "__func__", getattr(self.member, "func", self.member))


def defined(name: str, member: Any, owner: type | None = None) -> Definition:
    """Build a definition from a member as it stands in the dictionary of its class or module."""
    return Definition(name, member, owner)


def problems(definition: Definition) -> list[str]:
    """Return what is missing from one docstring."""
    text = definition.docstring
    if not text:
        return [] if _documented_by_a_base(definition) else ["has no docstring"]
    found = [] if stands_alone(text) else [f"has a first line that leans on its neighbour: {text.splitlines()[0]!r}"]
    if isinstance(definition.member, type):
        return found + _problems_of_class(definition.member, text)
    if _documented_by_a_base(definition) and "Args:" not in text:
        return found
    return found + _problems_of_function(definition, text)


def stands_alone(text: str) -> bool:
    """Return whether the first line of a docstring can be read without its neighbours."""
    return LEANING.match(text.strip()) is None


def sections(text: str) -> dict[str, list[str]]:
    """Return the lines of each section of a docstring, by the name of the section."""
    found: dict[str, list[str]] = {}
    lines: list[str] | None = None
    for line in text.splitlines():
        if line.rstrip().removesuffix(":") in SECTIONS and line.rstrip().endswith(":"):
            lines = found.setdefault(line.strip().removesuffix(":"), [])
        elif line.strip() and not line.startswith(" "):
            lines = None
        elif lines is not None:
            lines.append(line)
    return found


def described(lines: list[str]) -> set[str]:
    """Return the names that a section describes: `name: text`, `a, b: text` or `name (type): text`, least indented."""
    margin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    names: set[str] = set()
    for line in lines:
        match = re.match(r"([\w*`, .]+?)(?: \(.*?\))?:(?: |$)", line[margin:])
        if match:
            names.update(name.strip("`* ") for name in match.group(1).split(","))
    return names


def _problems_of_class(cls: type, text: str) -> list[str]:
    parts = sections(text)
    names = described(parts.get("Args", [])) | described(parts.get("Attributes", []))
    for base in cls.__mro__[1:-1]:
        base_parts = sections(inspect.cleandoc(base.__dict__.get("__doc__") or ""))
        names |= described(base_parts.get("Args", [])) | described(base_parts.get("Attributes", []))
    found = [f"does not describe the argument {name!r}" for name in _constructor_arguments(cls) if name not in names]
    raised = _raised(cls.__dict__.get("__init__")) | _raised(cls.__dict__.get("__post_init__"))
    found += _undescribed_errors(raised, parts)
    if _constructed_by_users(cls) and ">>>" not in "\n".join(parts.get("Example", [])):
        found.append("has no Example with `>>>` lines")
    return found


def _problems_of_function(definition: Definition, text: str) -> list[str]:
    function, parts = definition._function, sections(text)
    found = []
    if not isinstance(definition.member, property) and not hasattr(definition.member, "func"):
        names = described(parts.get("Args", []))
        found += [f"does not describe the argument {n!r}" for n in _arguments(function) if n not in names]
        returned = inspect.signature(function).return_annotation
        said_in_one_line = "\n" not in text and not _arguments(function)
        returns = returned not in (None, "None", "NoReturn", "Never") and not said_in_one_line
        if returns and not {"Returns", "Yields"} & parts.keys():
            found.append("has no Returns")
    return found + _undescribed_errors(_raised(function), parts)


def _undescribed_errors(raised: set[str], parts: dict[str, list[str]]) -> list[str]:
    names = described(parts.get("Raises", []))
    return [f"does not describe that it raises {name}" for name in sorted(raised - names)]


def _constructor_arguments(cls: type) -> list[str]:
    if issubclass(cls, enum.Enum | BaseException) or getattr(cls, "_is_protocol", False):
        return []
    if cls.__init__ is object.__init__ and cls.__new__ is object.__new__:
        return []
    return [name for name in inspect.signature(cls).parameters if not name.startswith("_")]


def _arguments(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters
    return [name for name in parameters if name not in ("self", "cls") and not name.startswith("_")]


def _raised(function: Any) -> set[str]:
    """Return the names of the typed errors that the body of a function raises itself."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError):
        return set()  # a constructor that a dataclass or object has made
    raised = {_error_name(node.exc) for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None}
    return raised & TYPED_ERRORS


def _error_name(node: ast.expr) -> str:
    node = node.func if isinstance(node, ast.Call) else node
    return node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")


def _constructed_by_users(cls: type) -> bool:
    return cls.__name__ in CONSTRUCTED - {"Prediction"} and not inspect.isabstract(cls)


def _documented_by_a_base(definition: Definition) -> bool:
    if definition.owner is None:
        return False
    name = definition.name.rpartition(".")[2]
    bases = definition.owner.__mro__[1:]
    return any(defined(name, base.__dict__[name]).docstring for base in bases if name in base.__dict__)


def packages() -> Iterator[ModuleType]:
    """Import and yield both packages and every subpackage."""
    for name in PACKAGES:
        package = importlib.import_module(name)
        yield package
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            if module.ispkg:
                yield importlib.import_module(module.name)


def public_definitions() -> list[Definition]:
    """Return every public class and function with their public methods and properties, each once."""
    found: dict[str, Definition] = {}
    for package in packages():
        for name in getattr(package, "__all__", ()):
            member = getattr(package, name)
            if isinstance(member, type) or inspect.isfunction(member):
                for definition in _with_members(member):
                    found.setdefault(definition.name, definition)
    return [found[name] for name in sorted(found) if name.partition(".")[0] in PACKAGES]


def _with_members(member: Any) -> Iterator[Definition]:
    name = f"{member.__module__}.{member.__qualname__}"
    yield defined(name, member)
    if not isinstance(member, type):
        return
    for attribute, value in vars(member).items():
        documentable = isinstance(value, property | classmethod | staticmethod) or inspect.isfunction(value)
        documentable = documentable or type(value).__name__ == "cached_property"
        if documentable and not attribute.startswith("_") and not _generated(member, attribute):
            yield defined(f"{name}.{attribute}", value, member)


def _generated(cls: type, attribute: str) -> bool:
    """Return whether a base class of another library (a named tuple, pydantic) has made the attribute."""
    return attribute in getattr(cls, "_fields", ()) or attribute in ("model_post_init",)


DEFINITIONS = public_definitions()
WITH_EXAMPLES = [definition for definition in DEFINITIONS if ">>>" in definition.docstring]


def test_public_docstrings_have_the_form():
    found = [f"{definition.name} {problem}" for definition in DEFINITIONS for problem in problems(definition)]
    assert not found, "\n".join(found)


def test_every_docstring_stands_alone():
    found = []
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if not stands_alone(text):
                    found.append(f"{module}.{getattr(node, 'name', '')}: {text.splitlines()[0]}")
    assert not found, "\n".join(found)


def test_the_public_api_is_found():
    names = {definition.name for definition in DEFINITIONS}
    assert {
        "estimators.laplace.linearized.LinearizedLaplace",
        "estimators.estimator.base.UncertaintyEstimator.fit",
        "bdl_bench.comparison.compare",
    } <= names


@pytest.mark.parametrize("definition", WITH_EXAMPLES, ids=[definition.name for definition in WITH_EXAMPLES])
def test_example_runs(definition: Definition, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Examples see the names of their module, as doctest does, and start from the same random state."""
    monkeypatch.chdir(tmp_path)
    output: list[str] = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        failed, attempted = run_example(definition, output.append)
    assert attempted
    assert not failed, "".join(output)


def run_example(definition: Definition, write: Callable[[str], Any]) -> tuple[int, int]:
    """Run the `>>>` lines of a docstring; return how many failed, and how many there are."""
    function = inspect.unwrap(definition._function)
    names = dict(vars(inspect.getmodule(function)))
    test = doctest.DocTestParser().get_doctest(definition.docstring, names, definition.name, None, None)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=write)
    return runner.failures, runner.tries


class DeepEnsemble:
    """Variance times a factor, under the name of a class that users construct.

    Args:
        factor: what the variance is multiplied by, dimensionless.
    """

    def __init__(self, factor: float, power: int = 1) -> None:
        if factor < 0:
            raise estimators.errors.OptionError("a factor ≥ 0", received=str(factor), remedy="give a positive one.")
        self.factor, self.power = factor, power

    def variance(self, x: torch.Tensor) -> torch.Tensor:
        """Its values at the query points."""
        return self.factor * x

    def undocumented(self) -> None:
        self.factor = 1.0

    def complete(self, x: torch.Tensor, *, level: float = 0.5) -> torch.Tensor:
        """Return the values at the query points.

        Args:
            x, level: the query points, shape (M, D), and a number in (0, 1).

        Returns:
            Values, shape (M, D).

        Raises:
            DataError: x has no rows.
        """
        if not len(x):
            raise estimators.errors.DataError("at least one row", received="none", remedy="give one.")
        return level * x


class ScaledTwice(DeepEnsemble):
    """Twice the variance."""

    def complete(self, x: torch.Tensor, *, level: float = 0.5) -> torch.Tensor:
        return 2 * super().complete(x, level=level)


def test_planted_docstrings_are_rejected():
    cls, variance, undocumented, complete = _with_members(DeepEnsemble)
    assert problems(cls) == [
        "does not describe the argument 'power'",
        "does not describe that it raises OptionError",
        "has no Example with `>>>` lines",
    ]
    assert problems(variance) == [
        "has a first line that leans on its neighbour: 'Its values at the query points.'",
        "does not describe the argument 'x'",
        "has no Returns",
    ]
    assert problems(undocumented) == ["has no docstring"]
    assert problems(complete) == []
    assert problems(list(_with_members(ScaledTwice))[1]) == []


def test_a_wrong_example_fails():
    """A wrong example.

    >>> 1 + 1
    3
    """
    definition = defined("wrong", test_a_wrong_example_fails)
    output: list[str] = []
    assert run_example(definition, output.append) == (1, 1)
    assert "Expected" in "".join(output)
