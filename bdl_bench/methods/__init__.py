"""The presets that the comparison offers, one family a file, in the order in which tables show them."""

from bdl_bench.methods import ensembles as retrained
from bdl_bench.methods import language_models as language
from bdl_bench.methods import laplace, regvar
from bdl_bench.methods import other_libraries as peers
from bdl_bench.methods import trained_network as plain
from bdl_bench.methods.registry import BASELINE, METHODS, REFERENCE, Axis, Method, default_methods, methods_named

__all__ = ["BASELINE", "METHODS", "REFERENCE", "Axis", "Method", "default_methods", "methods_named"]

for _family in (plain, retrained, language, laplace, regvar, peers):
    METHODS.update({method.name: method for method in _family.PRESETS})
