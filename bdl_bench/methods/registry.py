"""A preset: a named choice of parts of the library, and the one option of it that the comparison may tune."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bdl_bench.problem.problem import Problem
from estimators import UncertaintyEstimator
from estimators.errors import OptionError, UnsupportedError

__all__ = [
    "BASELINE",
    "METHODS",
    "PRIOR",
    "REFERENCE",
    "Axis",
    "Build",
    "Method",
    "around",
    "default_methods",
    "factors",
    "methods_named",
    "preset",
    "refuse_without_recipe",
]

Build = Callable[[Problem, int], UncertaintyEstimator]

BASELINE = "map"
REFERENCE = "laplace"


@dataclass(frozen=True)
class Axis:
    """The option of a method that tuning walks along: `values(problem, n)` are n of them, its own among them, or none.

    Every method has at most one, and gets the same number of values, so that none has a larger budget than another.
    """

    option: str
    values: Callable[[Problem, int], list[Any]]


@dataclass(frozen=True)
class Method:
    """A preset: `build(problem, seed)` gives an estimator yet to be fitted.

    Args:
        retrains: it trains networks of its own, and so needs `make_model` and `recipe` of the problem.
        default: it runs where no methods are named.
        axis: what tuning may change beside scale, temperature and noise.
    """

    name: str
    summary: str
    build: Build
    retrains: bool = False
    default: bool = False
    axis: Axis | None = None


def factors(n: int, *, decades: float) -> list[float]:
    """n factors evenly spaced in their logarithm, 1 among them, from 10^−decades to 10^decades for an odd n."""
    steps = max(1, n // 2)
    return [float(10 ** (decades * k / steps)) for k in range(-steps, steps + 1)][:n] if n > 1 else [1.0]


def around(option: str, centre: float, *, decades: float) -> Axis:
    """An axis of numbers about the preset's own."""
    return Axis(option, lambda problem, n: [centre * factor for factor in factors(n, decades=decades)])  # noqa: ARG005


def _prior_values(problem: Problem, n: int) -> list[Any]:
    """δ of the problem times factors from 1/100 to 100."""
    delta = problem.prior_precision
    if isinstance(delta, Mapping):
        return [{glob: float(value * factor) for glob, value in delta.items()} for factor in factors(n, decades=2)]
    return [float(delta * factor) for factor in factors(n, decades=2)]


PRIOR = Axis("prior_precision", _prior_values)

METHODS: dict[str, Method] = {}


def default_methods() -> list[str]:
    """The names of those that run where none are named."""
    return [name for name, method in METHODS.items() if method.default]


def preset(estimator: Callable[..., UncertaintyEstimator], *, seeded: bool = False, **options: Any) -> Build:  # noqa: ANN401
    """A build of an estimator class with the network, likelihood and δ of the problem, and with these options.

    `seeded`: it takes the seed of the cell, too.
    """

    def build(problem: Problem, seed: int) -> UncertaintyEstimator:
        chance = {"seed": seed} if seeded else {}
        return estimator(
            problem.model, problem.likelihood, prior_precision=problem.prior_precision, **chance, **options
        )

    return build


def refuse_without_recipe(name: str, problem: Problem) -> None:
    """UnsupportedError where a problem does not say how a network is made and trained."""
    if problem.recipe is None or problem.make_model is None:
        raise UnsupportedError(
            f"a problem with make_model and recipe, since {name} trains networks of its own",
            received="one without",
            remedy="pass make_model= and recipe= to Problem, or networks of your own: members=, dropout_model=.",
        )


def methods_named(names: Sequence[str]) -> list[Method]:
    """The presets of these names, in this order and once each."""
    for name in names:
        if name not in METHODS:
            raise OptionError(
                f"methods among {', '.join(METHODS)}",
                received=repr(name),
                remedy="bdl-bench list shows what each does.",
            )
    return [METHODS[name] for name in dict.fromkeys(names)]
