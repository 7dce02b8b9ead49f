"""The user's network: its derivatives by several routes, and the check that they agree with plain autograd."""

from estimators.models.functionals import ComposedNetwork, Functional, next_token_log_probs
from estimators.models.network import Network
from estimators.models.self_check import DerivativeReport, Disagreement

__all__ = ["ComposedNetwork", "DerivativeReport", "Disagreement", "Functional", "Network", "next_token_log_probs"]
