"""Presets: named estimators with their options, and the option of each that the comparison may tune."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from bdl_bench.problem.problem import Problem
from bdl_bench.suggestions import did_you_mean
from estimators import UncertaintyEstimator
from estimators.errors import OptionError, UnsupportedError

__all__ = [
    "ADAPTERS",
    "BASELINE",
    "METHODS",
    "POSTERIOR",
    "PRIOR",
    "REFERENCE",
    "Build",
    "Method",
    "OptionGrid",
    "around",
    "check_adapters",
    "check_recipe",
    "default_methods",
    "factors",
    "methods_named",
    "preset",
]

Build = Callable[[Problem, int], UncertaintyEstimator]

ADAPTERS = "*lora_*"
"""Pattern of the names of adapters' parameters, as peft has them."""
BASELINE = "map"
"""The method that all others are compared with."""
REFERENCE = "laplace"
"""The method whose variance is that of linearized Laplace, exactly."""
POSTERIOR = "reference-posterior"
"""The method that samples the posterior itself, without an approximation."""


@dataclass(frozen=True)
class OptionGrid:
    """The option of a method that the comparison tunes.

    Every method has at most one, with the same number of values, so that all have the same budget.

    Args:
        option: name of the option, such as "prior_precision" or "solver.lam".
        values: function of (problem, n) that returns n values, the preset's own among them, or an empty list.
    """

    option: str
    values: Callable[[Problem, int], list[Any]]


@dataclass(frozen=True)
class Method:
    """A preset of the comparison.

    Args:
        name: by which tables and the command line name it.
        summary: what it does, in one line.
        build: function of (problem, seed) that returns an estimator that is not fitted yet.
        retrains: whether it trains its own networks, so that it needs `make_model` and `recipe` of the problem.
        default: whether it runs if no methods are named.
        tuned_option: the option that tuning changes beside scale, temperature and noise; None if there is none.
    """

    name: str
    summary: str
    build: Build
    retrains: bool = False
    default: bool = False
    tuned_option: OptionGrid | None = None


def factors(n: int, *, decades: float) -> list[float]:
    """Return n log-spaced factors from 10^−decades on, with 1 among them.

    An odd n from 3 on ends at 10^decades. An even n has the factors of n + 1 without the last, since no even number of
    symmetric factors contains 1: n = 4 and two decades give 0.01, 0.1, 1, 10. n = 1 gives 1 alone.
    """
    steps = max(1, n // 2)
    return [float(10 ** (decades * k / steps)) for k in range(-steps, steps + 1)][:n] if n > 1 else [1.0]


def around(option: str, centre: float, *, decades: float) -> OptionGrid:
    """Return an option with values log-spaced around `centre`, the value of the preset."""
    return OptionGrid(option, lambda problem, n: [centre * factor for factor in factors(n, decades=decades)])  # noqa: ARG005


def _prior_values(problem: Problem, n: int) -> list[Any]:
    """Return n values of the problem's δ, times factors over two decades on either side (`factors`)."""
    delta = problem.prior_precision
    if isinstance(delta, Mapping):
        return [{glob: float(value * factor) for glob, value in delta.items()} for factor in factors(n, decades=2)]
    return [float(delta * factor) for factor in factors(n, decades=2)]


PRIOR = OptionGrid("prior_precision", _prior_values)

METHODS: dict[str, Method] = {}
"""All presets by name, filled when `bdl_bench.methods` is imported."""


def default_methods() -> list[str]:
    """Return the names of the methods that run if none are named."""
    return [name for name, method in METHODS.items() if method.default]


def preset(estimator: Callable[..., UncertaintyEstimator], *, seeded: bool = False, **options: Any) -> Build:  # noqa: ANN401
    """Return a function of a problem and a seed that builds an estimator with these options.

    `seeded`: whether the class takes the seed, too.
    """

    def build(problem: Problem, seed: int) -> UncertaintyEstimator:
        seed_option = {"seed": seed} if seeded else {}
        return estimator(
            problem.model, problem.likelihood, prior_precision=problem.prior_precision, **seed_option, **options
        )

    return build


def check_recipe(name: str, problem: Problem) -> None:
    """Raise UnsupportedError if a problem does not say how a network is made and trained."""
    if problem.recipe is None or problem.make_model is None:
        raise UnsupportedError(
            f"a problem with make_model and recipe, since {name} trains its own networks",
            received="one without",
            remedy="pass make_model= and recipe= to Problem, or networks of your own: members=, dropout_model=.",
        )


def check_adapters(name: str, problem: Problem) -> None:
    """Raise UnsupportedError if a problem's network has no trainable LoRA adapters."""
    names = [name for name, p in problem.model.named_parameters() if p.requires_grad]
    if not any(fnmatchcase(parameter, ADAPTERS) for parameter in names):
        raise UnsupportedError(
            f"a network with trainable LoRA adapters for {name}, parameters named {ADAPTERS}",
            received=f"{len(names)} trainable parameters, none of which is one",
            remedy="the task r8-lora has adapters; laplace-kron takes any network.",
        )


def methods_named(names: Sequence[str]) -> list[Method]:
    """Return the presets of these names, in this order and once each.

    Args:
        names: of presets.

    Returns:
        The presets.

    Raises:
        OptionError: for a name that no preset has.
    """
    for name in names:
        if name not in METHODS:
            raise OptionError(
                f"methods among {', '.join(METHODS)}",
                received=repr(name),
                remedy=did_you_mean(name, METHODS, "bdl-bench list shows what each does."),
            )
    return [METHODS[name] for name in dict.fromkeys(names)]
