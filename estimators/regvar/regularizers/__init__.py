"""The regularizers of RegVar, one per file."""

from estimators.regvar.regularizers.base import Regularizer
from estimators.regvar.regularizers.mean_absolute import MeanAbsolute
from estimators.regvar.regularizers.parameter_probes import ParameterProbes
from estimators.regvar.regularizers.pointwise import Pointwise
from estimators.regvar.regularizers.posterior_draws import PosteriorDraws
from estimators.regvar.regularizers.signed_probes import SignedProbes

__all__ = ["MeanAbsolute", "ParameterProbes", "Pointwise", "PosteriorDraws", "Regularizer", "SignedProbes"]
