"""The presets that the comparison offers, one family a file; importing this package registers them, in this order."""

from bdl_bench.methods import laplace, plain, regvar  # noqa: F401
from bdl_bench.methods.registry import BASELINE, METHODS, REFERENCE, Axis, Method, default_methods, methods_named

__all__ = ["BASELINE", "METHODS", "REFERENCE", "Axis", "Method", "default_methods", "methods_named"]
