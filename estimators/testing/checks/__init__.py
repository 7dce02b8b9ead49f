"""The checks by topic. Importing the modules registers the checks in this order."""

# isort: off
from estimators.testing.checks import interface
from estimators.testing.checks import closed_form
from estimators.testing.checks import invariants
from estimators.testing.checks import predictions
from estimators.testing.checks import covariances
from estimators.testing.checks import weights
from estimators.testing.checks import rows
from estimators.testing.checks import side_effects
from estimators.testing.checks import bad_input
from estimators.testing.checks import saving
# isort: on

__all__ = [
    "bad_input",
    "closed_form",
    "covariances",
    "interface",
    "invariants",
    "predictions",
    "rows",
    "saving",
    "side_effects",
    "weights",
]
