"""Does beforehand, once a process, what others do at their first use, so that no cell's seconds hold it: import it."""

from contextlib import suppress

import torch._dynamo  # noqa: F401  by the first optimizer of a process

from estimators.models.network import differentiable

with suppress(ImportError):  # of the extra `baselines`; plain networks are differentiated by it
    import backpack  # noqa: F401

with differentiable():  # compiles torch's rules of forward mode
    pass
