"""The presets of the comparison, one family per file, in the order of tables."""

from bdl_bench.methods import ensembles, language_models, laplace, other_libraries, regvar, trained_network
from bdl_bench.methods.registry import BASELINE, METHODS, REFERENCE, Method, OptionGrid, default_methods, methods_named

__all__ = ["BASELINE", "METHODS", "REFERENCE", "Method", "OptionGrid", "default_methods", "methods_named"]

for _family in (trained_network, ensembles, language_models, laplace, regvar, other_libraries):
    METHODS.update({method.name: method for method in _family.PRESETS})
