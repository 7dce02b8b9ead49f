"""Imports and compiles what is slow on first use, so that no run's seconds include it. Import it for the effect."""

import torch._dynamo  # noqa: F401  the first optimizer of a process imports it

from estimators.models.kernels import differentiable

with differentiable():  # compiles torch's rules of forward mode
    pass
