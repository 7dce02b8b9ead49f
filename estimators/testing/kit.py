"""check_estimator: the checks, one after the other, on an estimator of one's own."""

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
    """Check that an estimator keeps the contract of `UncertaintyEstimator`, and is right where it says that it is.

    Args:
        make: (model, likelihood, *, prior_precision) -> an estimator, not fitted.
        exact: what its variance J A⁻¹ Jᵀ is exact for: True or "ggn" (all weights), "hessian", "last_layer"; False for
            an approximation, of which laws and bounds are checked. None: the class attribute `exact`, or False.
        prior_of: the weights that it has a Gaussian posterior over, "all" or "last_layer": its variance obeys the
            laws of one. None: those of `exact`; where that is False, no laws (ensembles).
        noise: relative Monte-Carlo error of a variance, such as √(2/K); compared to five times that.
        tolerance: relative, in float64, where there is no noise.
        n_samples: function samples whose moments are compared.
        adapt: what the kit's networks (linear layers and tanh) are made into, for methods that need some layer.
        skip: reasons by the names of checks that do not apply.
        checks: names of those to make; None: all of them.
        device: where networks, rows and queries are, such as "cuda": results have to come back there.
        raises: whether to raise where some fail.

    Errors: ConformanceError with every failure and its likely fault; OptionError for a bad argument.
    """
    skip = dict(skip or {})
    _check_names([*skip, *(checks or ())])
    adapt = adapt or _as_it_is
    where = _device(device)
    claims = Capabilities(_claimed(make, exact, adapt, where), prior_of, noise, tolerance, n_samples)
    if prior_of is None and claims.exact is not None:
        claims = Capabilities(claims.exact, _prior_of(claims.exact), noise, tolerance, n_samples)
    if claims.prior_of not in _SUBSETS:
        raise OptionError(f"prior_of among {_SUBSETS}", received=repr(prior_of), remedy='"all".')
    subject = EstimatorUnderTest(make, claims, adapt, where)
    wanted = CHECKS if checks is None else {name: CHECKS[name] for name in CHECKS if name in checks}
    outcomes = tuple(_outcome(name, subject, skip.get(name)) for name in wanted)
    report = Report(_name(make), outcomes)
    if raises and report.failed:
        raise ConformanceError(report)
    return report


def _as_it_is(model: nn.Module) -> nn.Module:
    return model


def _check_names(names: Collection[str]) -> None:
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        raise OptionError(f"checks among {', '.join(CHECKS)}", received=repr(unknown[0]), remedy="one of these names.")


def _device(device: str | torch.device) -> torch.device:
    """With the index that its tensors have."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        remedy = '"cpu", or the name of an accelerator that PyTorch finds: "cuda", "mps", "xpu".'
        raise OptionError("a device of this machine", received=f"{device!r}: {error}", remedy=remedy) from error


def _claimed(
    make: Make, exact: bool | str | None, adapt: Callable[[nn.Module], nn.Module], device: torch.device
) -> str | None:
    """The claim as "ggn", "hessian", "last_layer" or None."""
    if exact is None:
        exact = _attribute(EstimatorUnderTest(make, Capabilities(None, None, 0.0, 0.0, 1), adapt, device))
    if exact not in _EXACT:
        raise OptionError(f"exact among {_EXACT}", received=repr(exact), remedy="False for an approximation.")
    if isinstance(exact, bool):
        return "ggn" if exact else None
    return exact


def _attribute(subject: EstimatorUnderTest) -> bool | str:
    """The class attribute `exact` of the first estimator that is made at all."""
    for case in subject.cases.values():
        try:
            return getattr(subject.build(case), "exact", False)
        except NotApplicable:
            continue
    return False


def _prior_of(exact: str) -> str:
    return "last_layer" if exact == "last_layer" else "all"


def _outcome(name: str, subject: EstimatorUnderTest, reason: str | None) -> Outcome:
    if reason is not None:
        return Outcome(name, "skipped", reason)
    try:
        with preserved_random_state():
            CHECKS[name](subject)
    except NotApplicable as found:
        return Outcome(name, "skipped", str(found))
    except CheckFailure as mismatch:
        return Outcome(name, "failed", str(mismatch))
    except Exception as error:
        text = "".join(traceback.format_exception(error)).rstrip()
        return Outcome(name, "failed", f"raised {type(error).__name__}: {error}\n{text}")
    return Outcome(name, "passed")


def _name(make: Make) -> str:
    return str(getattr(getattr(make, "func", make), "__name__", repr(make)))
