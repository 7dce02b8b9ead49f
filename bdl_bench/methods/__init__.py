"""The presets of the comparison, one family per file, in the order of tables."""

from bdl_bench.methods import laplace, networks, processes, reference, regvar, sampling, variational
from bdl_bench.methods.registry import (
    BASELINE,
    METHODS,
    POSTERIOR,
    REFERENCE,
    Method,
    OptionGrid,
    default_methods,
    methods_named,
)

__all__ = ["BASELINE", "METHODS", "POSTERIOR", "REFERENCE", "Method", "OptionGrid", "default_methods", "methods_named"]

for _presets in (
    networks.PRESETS,
    laplace.PRESETS,
    regvar.PRESETS,
    variational.PRESETS,
    sampling.PRESETS,
    processes.PRESETS,
    laplace.LAPLACE_TORCH,
    reference.PRESETS,
):
    METHODS.update({method.name: method for method in _presets})
