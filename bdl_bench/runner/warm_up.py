"""Does beforehand, once a process, what others do at their first use, so that no cell's seconds hold it: import it."""

import torch._dynamo  # noqa: F401  by the first optimizer of a process

from estimators.models.kernels import differentiable

with differentiable():  # compiles torch's rules of forward mode
    pass
