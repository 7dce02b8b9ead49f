"""Small networks of other people's kinds, with what an estimator has to do with each. `BUILDERS[name]()` makes one."""

from trust_networks import (
    compiled,
    forms,
    gradient_rules,
    last_layers,
    more_operations,
    operations,
    parametrized,
    rows,
    transforms,
    weights_elsewhere,
)
from trust_networks.case import BUILDERS, Case, float64_default

__all__ = [
    "BUILDERS",
    "Case",
    "compiled",
    "float64_default",
    "forms",
    "gradient_rules",
    "last_layers",
    "more_operations",
    "operations",
    "parametrized",
    "rows",
    "transforms",
    "weights_elsewhere",
]
