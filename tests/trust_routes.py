"""Every public route to a variance, run on one case and judged against plain autograd on the module itself."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from plain_autograd import Reference, copied, outputs, reference
from torch import Tensor, nn
from trust_networks import BUILDERS, Case, float64_default
from trust_networks.case import SIZES, in_batches

from estimators import (
    Gaussian,
    LastLayerLaplace,
    LinearizedLaplace,
    LinearResponse,
    NewtonRefit,
    Pointwise,
    PosteriorDraws,
    RegVar,
)
from estimators.errors import EstimatorError

__all__ = ["DEFAULTS", "LIKELIHOODS", "ROUTES", "Outcome", "builders", "run"]

LIKELIHOODS = ("regression", "classification")
PRIOR_PRECISION, SIGMA = 1.7, 0.7
_DRAWS = 1000
_STATISTICAL = 5 * math.sqrt(2 / _DRAWS)  # five standard errors of a mean of 1,000 squares, relative
_REFIT = 2e-4  # central differences at λ = 1e-4: the bound of test_lambda_sweeps.py


@dataclass(frozen=True)
class Outcome:
    """What one route did: a relative error, or the name of a typed error, or a raw one; and what it left behind."""

    error: float | None
    raised: str | None = None
    raw: str | None = None
    left_behind: tuple[str, ...] = ()

    def failures(self, case: Case, route: Route, *, may_answer: bool = True) -> list[str]:
        found = [f"left behind: {what}" for what in self.left_behind]
        if self.raw is not None:
            found.append(f"raw error: {self.raw}")
        elif self.raised is not None and case.expects == "answer" and route.must_answer:
            found.append(f"has to answer: {self.raised}")
        elif self.error is not None and not may_answer:
            found.append("answers where there is no answer")
        elif self.error is not None and not self.error <= max(route.tolerance, case.tolerance):
            found.append(f"relative error {self.error:.3g}")
        return found

    def __str__(self) -> str:
        if self.raw is not None:
            return f"raw {self.raw.split(':')[0]}"
        return self.raised.split(":")[0] if self.raised is not None else f"{self.error:.1e}"


@dataclass(frozen=True)
class Route:
    """`fit` makes a fitted estimator; `error` compares it with the reference over the same weights."""

    fit: Callable[[Case, str], object]
    error: Callable[[object, Case, Reference], float]
    tolerance: float = 1e-6
    must_answer: bool = False


def builders() -> dict[str, Callable[[], Case]]:
    """The networks of this folder, and those of a file of cases beside the repository, where there is one."""
    return {**BUILDERS, **_shared()}


def run(name: str, likelihood: str, route: Route) -> tuple[Outcome, list[str]]:
    """One route on a new build of a case: the outcome, and what is wrong with it."""
    case = builders()[name]()
    before = _Snapshot(case)
    fitted = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fitted = route.fit(case, likelihood)
            with torch.random.fork_rng(devices=[]):
                expected = _reference(name, likelihood, _names(fitted))
            outcome = Outcome(route.error(fitted, case, expected))
        except EstimatorError as error:
            outcome = Outcome(None, raised=f"{type(error).__name__}: {error}")
        except Exception as error:  # whatever else is raised is a fault to report
            outcome = Outcome(None, raw=f"{type(error).__name__}: {str(error)[:200]}")
        outcome = dataclasses.replace(outcome, left_behind=tuple(dict.fromkeys(before.differences(case))))
        answered = outcome.error is not None and case.expects == "raise"
        may_answer = not answered or _has_an_answer(name, likelihood, _names(fitted))
    return outcome, outcome.failures(case, route, may_answer=may_answer)


def _loader(case: Case, likelihood: str) -> list:
    return list(zip(case.batches, _targets(case, likelihood), strict=True))


def _targets(case: Case, likelihood: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    sizes = [len(f) for f in _outputs_of_batches(case.name)]
    if likelihood == "regression":
        return [torch.randn(n, case.n_outputs, generator=generator, dtype=torch.float64) for n in sizes]
    return [torch.randint(case.n_outputs, (n,), generator=generator) for n in sizes]


@lru_cache
def _outputs_of_batches(name: str) -> list[Tensor]:
    case = builders()[name]()
    with torch.random.fork_rng(devices=[]):
        return [outputs(case.model, copied(x)).detach() for x in case.batches]


def _fitted(kind: type, **options) -> Callable[[Case, str], object]:
    def fit(case: Case, likelihood: str):
        chosen = Gaussian(sigma_noise=SIGMA) if likelihood == "regression" else likelihood
        estimator = kind(case.model, chosen, prior_precision=PRIOR_PRECISION, **options)
        return estimator.fit(_loader(case, likelihood))

    return fit


def _worst(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest variance; infinite where something is not a number."""
    if found.shape != expected.shape:
        raise ValueError(f"shape {tuple(found.shape)} for {tuple(expected.shape)}")
    error = float((found.double() - expected).abs().max() / expected.abs().max())
    return error if math.isfinite(error) else math.inf


def _variance(fitted, case: Case, expected: Reference) -> float:
    together = _worst(fitted.variance(case.queries).flatten(1), expected.variance)
    first = _first_row(case.queries)
    if first is None:
        return together
    scale = expected.variance.max()
    alone = (fitted.variance(first).flatten(1).double() - expected.variance[:1]).abs().max() / scale
    return max(together, float(alone)) if math.isfinite(float(alone)) else math.inf


def _refitted(fitted, case: Case, expected: Reference) -> float:
    """Of the first query, if there is one by itself: each output is a refit."""
    first = _first_row(case.queries)
    if first is None:
        return _worst(fitted.variance(case.queries).flatten(1), expected.variance)
    return _worst(fitted.variance(first).flatten(1), expected.variance[:1])


def _first_row(x):
    """The first query by itself; None where the inputs do not count their rows."""
    tensors = list(x.values()) if isinstance(x, Mapping) else [x]
    if len({len(t) for t in tensors}) > 1:
        return None
    return {k: v[:1].clone() for k, v in x.items()} if isinstance(x, Mapping) else x[:1].clone()


def _diagonal(fitted, case: Case, expected: Reference) -> float:
    return _worst(fitted.variance(case.queries).flatten(1), expected.diagonal_variance)


def _covariance(fitted, case: Case, expected: Reference) -> float:
    return _worst(fitted.covariance(case.queries), expected.covariance)


def _of_draws(found: Tensor, expected: Tensor) -> float:
    floor = 1e-9 * expected.max()
    error = float(((found.double() - expected).abs() / expected.clamp_min(floor)).max())
    return error if math.isfinite(error) else math.inf


def _drawn_variance(fitted, case: Case, expected: Reference) -> float:
    return _of_draws(fitted.variance(case.queries).flatten(1), expected.variance)


def _sampled(fitted, case: Case, expected: Reference) -> float:
    samples = fitted.sample(case.queries, _DRAWS).flatten(2)
    f = outputs(builders()[case.name]().model, copied(case.queries)).detach()
    return _of_draws((samples - f).square().mean(0), expected.variance)


def _outside_of_bounds(fitted, case: Case, expected: Reference) -> float:
    lower, upper = (bound.flatten(1).double() for bound in fitted.variance_bounds(case.queries))
    outside = torch.maximum(lower - expected.variance, expected.variance - upper).max() / expected.variance.max()
    return max(float(outside), 0.0) if math.isfinite(float(outside)) else math.inf


def _evidence(fitted, case: Case, expected: Reference) -> float:
    """The log marginal likelihood in nats, to 1e-6 of itself."""
    likelihood = "regression" if isinstance(fitted.likelihood, Gaussian) else "classification"
    f = torch.cat(_outputs_of_batches(case.name)).double()
    y = torch.cat(_targets(case, likelihood))
    if likelihood == "regression":
        log_likelihood = torch.distributions.Normal(f, SIGMA).log_prob(y).sum()
    else:
        log_likelihood = -torch.nn.functional.cross_entropy(f, y, reduction="sum")
    right = log_likelihood + expected.log_prior_minus_log_det
    error = float((fitted.log_marginal_likelihood().double() - right).abs() / right.abs().clamp_min(1.0))
    return error if math.isfinite(error) else math.inf


_EXACT = {"regularizer": Pointwise(), "solver": LinearResponse()}
_BOUNDED = {"regularizer": PosteriorDraws(8, variance_estimate="bounds"), "solver": LinearResponse()}
_NEWTON = {"regularizer": Pointwise(), "solver": NewtonRefit(1e-4)}

ROUTES: dict[str, Route] = {
    "laplace": Route(_fitted(LinearizedLaplace), _variance, must_answer=True),
    "pointwise": Route(_fitted(RegVar, **_EXACT), _variance, must_answer=True),
    "cholesky": Route(_fitted(LinearizedLaplace, inverse="cholesky"), _covariance),
    "dual": Route(_fitted(LinearizedLaplace, inverse="dual"), _covariance),
    "matrix_free_dual": Route(_fitted(LinearizedLaplace, inverse="matrix_free_dual"), _covariance),
    "cg": Route(_fitted(LinearizedLaplace, inverse="cg"), _covariance),
    "diag": Route(_fitted(LinearizedLaplace, hessian_structure="diag"), _diagonal),
    "last layer": Route(_fitted(LastLayerLaplace), _variance),
    "evidence": Route(_fitted(LinearizedLaplace), _evidence),
    "evidence, last layer": Route(_fitted(LastLayerLaplace), _evidence),
    "last layer, by subset": Route(_fitted(LinearizedLaplace, subset_of_weights="last_layer"), _variance),
    "draws": Route(
        _fitted(RegVar, regularizer=PosteriorDraws(_DRAWS), solver=LinearResponse()), _drawn_variance, _STATISTICAL
    ),
    "bounds": Route(_fitted(RegVar, **_BOUNDED), _outside_of_bounds),
    "samples": Route(_fitted(LinearizedLaplace), _sampled, _STATISTICAL),
    "samples, cg": Route(_fitted(LinearizedLaplace, inverse="cg"), _sampled, _STATISTICAL),
    "refit": Route(_fitted(RegVar, **_NEWTON), _refitted, _REFIT),
}
DEFAULTS = ("laplace", "pointwise")


def _names(fitted) -> tuple[str, ...] | None:
    """The weights that the estimator chose, by the names of the user's module."""
    chosen = tuple(fitted.network_.subset.shapes)
    parameters = [name for name, p in fitted.model.named_parameters() if p.requires_grad]
    if len(chosen) == len(parameters):
        return None
    parameters = [name for name, _ in fitted.model.named_parameters(remove_duplicate=False)]
    plain = {name.replace("_orig_mod.", ""): name for name in parameters}
    return tuple(name if name in parameters else plain[name] for name in chosen)


@lru_cache
def _reference(name: str, likelihood: str, names: tuple[str, ...] | None) -> Reference:
    case = builders()[name]()
    return reference(
        case.model,
        case.batches,
        case.queries,
        likelihood,
        prior_precision=PRIOR_PRECISION,
        sigma=SIGMA,
        names="*" if names is None else names,
    )


def _has_an_answer(name: str, likelihood: str, names: tuple[str, ...] | None) -> bool:
    """Whether a network that is to be rejected has a variance over these weights all the same: rows that do not depend
    on each other, and a slope that is a number and not zero (its last layer may have one where the rest has not)."""
    variance = _reference(name, likelihood, names).variance
    if not bool(variance.isfinite().all()) or float(variance.max()) == 0:
        return False
    case = builders()[name]()
    together = outputs(case.model, copied(case.queries)).detach()
    alone = torch.cat([outputs(case.model, row).detach() for row in case.queries.split(1)])
    return torch.allclose(together, alone)


class _Snapshot:
    """The user's model and data as they are, to be compared with what they are later."""

    def __init__(self, case: Case) -> None:
        model = case.model
        self.tensors = {name: (t, t.detach().clone()) for name, t in _tensors(model).items()}
        self.modules = {name: _attributes(m) for name, m in model.named_modules()}
        self.data = [copied(x) for x in [*case.batches, case.queries]]
        self.random = torch.get_rng_state()
        self.grad = torch.is_grad_enabled()

    def differences(self, case: Case) -> list[str]:
        return [*self._of_tensors(case.model), *self._of_modules(case.model), *self._of_the_rest(case)]

    def _of_tensors(self, model: nn.Module) -> list[str]:
        found, now = [], _tensors(model)
        if set(now) != set(self.tensors):
            found.append(f"other tensors: {sorted(set(now) ^ set(self.tensors))}")
        for name, (tensor, value) in self.tensors.items():
            if now.get(name) is not tensor:
                found.append(f"{name} is another tensor")
            elif not torch.equal(tensor, value):
                found.append(f"{name} has other values")
            if tensor.grad is not None:
                found.append(f"{name} has a gradient")
        return found

    def _of_modules(self, model: nn.Module) -> list[str]:
        found = []
        for name, module in model.named_modules():
            before, now = self.modules.get(name, {}), _attributes(module)
            changed = [key for key in before.keys() | now.keys() if not _same(before.get(key), now.get(key))]
            found += [f"{name or 'the model'}: attribute {key} changed" for key in sorted(changed)]
            wrapped = [key for key in now if _holds_wrapped(vars(module)[key])]
            found += [f"{name or 'the model'}.{key} holds a tensor of a transformation" for key in wrapped]
        return found

    def _of_the_rest(self, case: Case) -> list[str]:
        found = []
        for before, now in zip(self.data, [*case.batches, case.queries], strict=True):
            pairs = [(before[k], now[k]) for k in before] if isinstance(before, Mapping) else [(before, now)]
            if not all(torch.equal(a, b) for a, b in pairs):
                found.append("inputs have other values")
        if not torch.equal(self.random, torch.get_rng_state()):
            found.append("the global random state moved")
        if torch.is_grad_enabled() != self.grad:
            found.append("grad mode changed")
        return found


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


_REGISTRIES = ("_parameters", "_buffers", "_modules")


def _attributes(module: nn.Module) -> dict[str, object]:
    """What `vars` shows, containers of hooks by their entries; of a scripted module nothing."""
    if isinstance(module, torch.jit.ScriptModule):
        return {}
    shown = {}
    for key, value in vars(module).items():
        if key in _REGISTRIES:
            shown[key] = tuple(value)
        elif isinstance(value, Tensor):
            shown[key] = id(value)
        elif "hooks" in key and isinstance(value, Mapping):
            shown[key] = tuple(value.items())
        else:
            shown[key] = value
    return shown


def _same(a: object, b: object) -> bool:
    if a is b:
        return True
    try:
        return type(a) is type(b) and bool(a == b)
    except (RuntimeError, ValueError, TypeError):
        return False


def _holds_wrapped(value: object, depth: int = 4) -> bool:
    """Whether a tensor of torch.func is in a container: it outlives its transformation and cannot be used."""
    if isinstance(value, Tensor):
        return torch._C._functorch.is_functorch_wrapped_tensor(value) or type(value) not in (Tensor, nn.Parameter)
    if depth == 0 or isinstance(value, nn.Module):
        return False
    if isinstance(value, Mapping):
        return any(_holds_wrapped(v, depth - 1) for v in value.values())
    return isinstance(value, (list, tuple)) and any(_holds_wrapped(v, depth - 1) for v in value)


_FILE = Path(__file__).resolve().parents[2] / "shared" / "cases" / "trust_cases.py"


@lru_cache
def _shared() -> dict[str, Callable[[], Case]]:
    """Cases of the same form that lie beside the repository; none where there are none."""
    if not _FILE.exists():
        return {}
    with float64_default(), torch.random.fork_rng(devices=[]):  # the file sets the default dtype at import
        spec = importlib.util.spec_from_file_location("cases_beside_the_repository", _FILE)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        names = [case[0] for case in module.cases()]

    def builder(index: int) -> Callable[[], Case]:
        def build() -> Case:
            with float64_default(), torch.random.fork_rng(devices=[]):
                name, model, x, queries, *rest = list(module.cases())[index]
            return Case(f"beside: {name}", "beside", model.eval(), in_batches(x, SIZES), copied(queries), *rest)

        return build

    return {f"beside: {name}": builder(i) for i, name in enumerate(names)}
