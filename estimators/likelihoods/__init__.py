"""Likelihoods p(y | f)."""

from estimators.errors import OptionError
from estimators.likelihoods.base import Likelihood
from estimators.likelihoods.bernoulli import Bernoulli
from estimators.likelihoods.categorical import Categorical
from estimators.likelihoods.causal_tokens import CausalTokens
from estimators.likelihoods.gaussian import Gaussian
from estimators.option_checks import shown

__all__ = ["Bernoulli", "Categorical", "CausalTokens", "Gaussian", "Likelihood", "resolve_likelihood"]

_BY_NAME: dict[str, type[Likelihood]] = {
    "regression": Gaussian,
    "classification": Categorical,
    "binary": Bernoulli,
    "causal_lm": CausalTokens,
}


def resolve_likelihood(likelihood: str | Likelihood) -> Likelihood:
    """Return the likelihood of a name; a likelihood is returned as it is.

    Args:
        likelihood: a likelihood, or "regression" (`Gaussian`), "classification" (`Categorical`), "binary" (`Bernoulli`)
            or "causal_lm" (`CausalTokens`).

    Returns:
        The likelihood.

    Raises:
        OptionError: anything else.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if not isinstance(likelihood, str) or likelihood not in _BY_NAME:
        raise OptionError(
            f"a likelihood object or one of {sorted(_BY_NAME)}",
            received=shown(likelihood),
            remedy='for example likelihood="classification" or Gaussian(sigma_noise=0.5).',
        )
    return _BY_NAME[likelihood]()
