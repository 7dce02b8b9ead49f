"""Docstrings of the public API have one form: what it does, Args, Returns, Raises, and an Example.

Public are the names in `__all__` of both packages and of their folders, with the public methods of these classes. An
override of a documented method of a public base class needs none of its own.
"""

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap

import pytest

import bdl_bench
import estimators

VAGUE = re.compile(r"^(Of|Likewise|Its|The same|Also|As above|See above|Ditto)\b")
NOT_ARGUMENTS = {"self", "cls"}
TYPED_ERROR = re.compile(r"\b[A-Z]\w*Error$")


def folders():
    for package in (estimators, bdl_bench):
        yield package
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if found.ispkg:
                yield importlib.import_module(found.name)


def is_ours(thing):
    return getattr(thing, "__module__", "").partition(".")[0] in ("estimators", "bdl_bench")


def public():
    """Functions, classes and their own public methods, by their full names."""
    found = {}
    for folder in folders():
        for name in getattr(folder, "__all__", ()):
            thing = getattr(folder, name)
            if is_ours(thing) and (inspect.isclass(thing) or inspect.isfunction(thing)):
                found[f"{thing.__module__}.{thing.__qualname__}"] = thing
                if inspect.isclass(thing):
                    found.update(dict(own_methods(thing)))
    return found


def own_methods(cls):
    """Public methods that the class defines, and that no documented base class defines too."""
    for name, member in vars(cls).items():
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        if any(getattr(getattr(base, name, None), "__doc__", None) for base in cls.__mro__[1:]):
            continue
        yield f"{cls.__module__}.{cls.__qualname__}.{name}", function


def constructed_by_users(thing):
    """Classes with a constructor, exceptions and abstract ones apart."""
    if not inspect.isclass(thing) or inspect.isabstract(thing) or issubclass(thing, (Exception, Warning)):
        return False
    return thing.__name__ in getattr(estimators, "__all__", ()) or thing.__name__ in CONSTRUCTED


CONSTRUCTED = {
    "DeepEnsemble", "GradientNorm", "LaplaceTorch", "LoRAEnsemble", "MAP", "MCDropout", "MultiHeadEnsemble", "Problem",
    "Recipe", "SWAG", "SubnetworkLaplace", "TemperatureScaling",
}  # fmt: skip


def faults(thing):
    """What is missing in the docstring of a function or class."""
    text = inspect.cleandoc(thing.__doc__ or "")
    if not text or (inspect.isclass(thing) and text.startswith(f"{thing.__name__}(")):  # a dataclass without one
        return ["a docstring"]
    found = [] if not VAGUE.match(text) else [f"a first line that stands alone, not {text.splitlines()[0]!r}"]
    function = thing.__init__ if inspect.isclass(thing) else thing
    arguments = arguments_of(function) if inspect.isfunction(function) else []
    if inspect.isclass(thing) and issubclass(thing, (Exception, Warning)):
        return found
    documented = text.partition("\nArgs:")[2] + text.partition("\nAttributes:")[2]
    found += [
        f"the argument {name!r}" for name in arguments if not re.search(rf"^\s+\*{{0,2}}{name}\b.*:", documented, re.M)
    ]
    if inspect.isfunction(thing):
        returned = thing.__annotations__.get("return")
        one_line = "\n" not in text and not arguments  # a property or a query without arguments says it in one line
        if (
            returned not in (None, "None", "NoReturn")
            and not one_line
            and not re.search(r"^(Returns|Yields):", text, re.M)
        ):
            found.append("Returns")
        if raises(thing) and not re.search(r"^Raises:", text, re.M):
            found.append("Raises")
    if constructed_by_users(thing) and not re.search(r"^Examples?:", text, re.M):
        found.append("Example")
    return found


def arguments_of(function):
    parameters = inspect.signature(function).parameters
    return [name for name in parameters if name not in NOT_ARGUMENTS and not name.startswith("_")]


def raises(function):
    """Whether the body raises an error of the library."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]
    names = [ast.unparse(exc.func if isinstance(exc, ast.Call) else exc) for exc in raised]
    return any(TYPED_ERROR.search(name) for name in names)


PUBLIC = public()


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_public_docstring_has_all_of_its_parts(name):
    assert faults(PUBLIC[name]) == []


def test_a_docstring_without_a_part_is_found():
    def bad(x: int, y: int) -> int:
        """Of x.

        Args:
            x: a number.
        """
        if y:
            raise estimators.errors.OptionError("a", received="b", remedy="c")
        return x

    assert len(faults(bad)) == 4
