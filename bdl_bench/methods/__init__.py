"""The presets that the comparison offers, one family a file, in the order in which tables show them."""

from bdl_bench.methods import language, laplace, peers, plain, regvar, retrained
from bdl_bench.methods.registry import BASELINE, METHODS, REFERENCE, Axis, Method, default_methods, methods_named

__all__ = ["BASELINE", "METHODS", "REFERENCE", "Axis", "Method", "default_methods", "methods_named"]

for _family in (plain, retrained, language, laplace, regvar, peers):
    METHODS.update({method.name: method for method in _family.PRESETS})
