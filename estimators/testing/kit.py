"""`check_estimator`: run all checks on an estimator."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection, Mapping

import torch
from torch import nn

from estimators.errors import OptionError
from estimators.runtime.rng import preserved_random_state
from estimators.testing import checks as _checks
from estimators.testing.estimator_under_test import Capabilities, EstimatorUnderTest, Make
from estimators.testing.outcomes import CheckFailure, ConformanceError, NotApplicable, Outcome, Report
from estimators.testing.registry import CHECKS

__all__ = ["check_estimator"]

assert _checks  # importing them has registered them
_EXACT = (True, False, "ggn", "hessian", "last_layer")
_SUBSETS = ("all", "last_layer", None)


def check_estimator(
    make: Make,
    *,
    exact: bool | str | None = None,
    prior_of: str | None = None,
    noise: float = 0.0,
    tolerance: float = 1e-6,
    n_samples: int = 2000,
    adapt: Callable[[nn.Module], nn.Module] | None = None,
    skip: Mapping[str, str] | None = None,
    checks: Collection[str] | None = None,
    device: str | torch.device = "cpu",
    raises: bool = True,
) -> Report:
    """Check that an estimator keeps the contract of `UncertaintyEstimator`, and that its declared properties hold.

    Args:
        make: (model, likelihood, *, prior_precision) to an estimator that is not fitted.
        exact: the A for which the variance is exactly J A⁻¹ Jᵀ: True or "ggn" (all weights), "hessian", "last_layer".
            False for an approximation, for which invariants and bounds are checked. None: the class attribute `exact`,
            or False.
        prior_of: the weights with a Gaussian posterior, "all" or "last_layer", whose invariants are checked. None:
            those of `exact`; if that is False, no invariants (ensembles).
        noise: the relative Monte-Carlo error of a variance, such as √(2/K); five times as much is allowed.
        tolerance: the relative tolerance in float64 without noise.
        n_samples: the number of function samples whose moments are compared.
        adapt: converts the kit's networks (linear layers and tanh), for methods that need a certain layer.
        skip: reasons by the names of checks to skip.
        checks: the names of the checks to run; None: all.
        device: the device of networks, rows and queries, such as "cuda"; results must be on it.
        raises: whether to raise if a check fails.

    Returns:
        The outcomes of all checks.

    Raises:
        ConformanceError: with every failure and its likely fault.
        OptionError: for an invalid argument.

    Example:
        >>> from estimators import LinearizedLaplace
        >>> report = check_estimator(LinearizedLaplace, exact=True, checks=["shapes", "closed-form-regression"])
        >>> report.passed
        ['shapes', 'closed-form-regression']
    """
    skip = dict(skip or {})
    _check_names([*skip, *(checks or ())])
    adapt = adapt or (lambda model: model)
    resolved_device = _device(device)
    curvature = _declared_exact(make, exact, adapt, resolved_device)
    if prior_of is None and curvature is not None:
        prior_of = "last_layer" if curvature == "last_layer" else "all"
    if prior_of not in _SUBSETS:
        raise OptionError(f"prior_of among {_SUBSETS}", received=repr(prior_of), remedy='"all".')
    capabilities = Capabilities(curvature, prior_of, noise, tolerance, n_samples)
    tested = EstimatorUnderTest(make, capabilities, adapt, resolved_device)
    wanted = CHECKS if checks is None else {name: CHECKS[name] for name in CHECKS if name in checks}
    outcomes = tuple(_outcome(name, tested, skip.get(name)) for name in wanted)
    report = Report(_name(make), outcomes)
    if raises and report.failed:
        raise ConformanceError(report)
    return report


def _check_names(names: Collection[str]) -> None:
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        raise OptionError(f"checks among {', '.join(CHECKS)}", received=repr(unknown[0]), remedy="one of these names.")


def _device(device: str | torch.device) -> torch.device:
    """Return the device with the index that its tensors have. Raises OptionError if it does not exist."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        remedy = '"cpu", or the name of an accelerator that PyTorch finds: "cuda", "mps", "xpu".'
        raise OptionError("a device of this machine", received=f"{device!r}: {error}", remedy=remedy) from error


def _declared_exact(
    make: Make, exact: bool | str | None, adapt: Callable[[nn.Module], nn.Module], device: torch.device
) -> str | None:
    """Return `exact` as "ggn", "hessian", "last_layer" or None."""
    if exact is None:
        exact = _attribute(EstimatorUnderTest(make, Capabilities(None, None, 0.0, 0.0, 1), adapt, device))
    if exact not in _EXACT:
        raise OptionError(f"exact among {_EXACT}", received=repr(exact), remedy="False for an approximation.")
    if isinstance(exact, bool):
        return "ggn" if exact else None
    return exact


def _attribute(tested: EstimatorUnderTest) -> bool | str:
    """Return the class attribute `exact` of the first estimator that can be constructed."""
    for case in tested.cases.values():
        try:
            return getattr(tested.build(case), "exact", False)
        except NotApplicable:
            continue
    return False


def _outcome(name: str, tested: EstimatorUnderTest, reason: str | None) -> Outcome:
    if reason is not None:
        return Outcome(name, "skipped", reason)
    try:
        with preserved_random_state():
            CHECKS[name](tested)
    except NotApplicable as reason_found:
        return Outcome(name, "skipped", str(reason_found))
    except CheckFailure as failure:
        return Outcome(name, "failed", str(failure))
    except Exception as error:
        text = "".join(traceback.format_exception(error)).rstrip()
        return Outcome(name, "failed", f"raised {type(error).__name__}: {error}\n{text}")
    return Outcome(name, "passed")


def _name(make: Make) -> str:
    return str(getattr(getattr(make, "func", make), "__name__", repr(make)))
