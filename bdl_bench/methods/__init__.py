"""The presets of the comparison, one family per file, in the order of tables."""

from bdl_bench.methods import laplace, networks, other_libraries, regvar
from bdl_bench.methods.registry import BASELINE, METHODS, REFERENCE, Method, OptionGrid, default_methods, methods_named

__all__ = ["BASELINE", "METHODS", "REFERENCE", "Method", "OptionGrid", "default_methods", "methods_named"]

for _family in (networks, laplace, regvar, other_libraries):
    METHODS.update({method.name: method for method in _family.PRESETS})
