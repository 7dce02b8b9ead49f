"""The interface of a regularizer: which r(θ) to displace by, and how to read the response."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from estimators.models.functionals import Functional
from estimators.models.network import Network
from estimators.numerics.pytrees import PyTree
from estimators.objective.objective import Objective
from estimators.option_checks import checked_integer
from estimators.regvar.perturbation import Perturbation
from estimators.regvar.solvers.base import Solution
from estimators.regvar.variance_estimate import VarianceEstimate

__all__ = ["Posed", "Regularizer", "checked_count", "probe_generator"]

Read = Callable[[Solution], VarianceEstimate]
Posed = tuple[Perturbation, Read]


class Regularizer(ABC):
    """r(θ) and its readout.

    *At fit* (`at_query` False): the K displacements are solved in `fit`, and no data are needed afterwards.
    *At query*: `fit` keeps the batches, and `variance(x)` solves.
    """

    at_query: ClassVar[bool] = False
    batch_dependent: ClassVar[bool] = False
    needs_ggn: ClassVar[bool] = False
    signed: ClassVar[bool] = False
    """Whether its estimates of a variance may be negative; a prediction has 0 there."""

    @abstractmethod
    def pose(self, objective: Objective, x: PyTree = None) -> Posed:
        """The penalty at the queries x (None for regularizers at fit), and what turns its solution to a readout."""

    def restored(self, network: Network, tensors: dict[str, Tensor], learned: dict[str, Any]) -> VarianceEstimate:
        """The readout of a fit from its `state()`; only regularizers at fit have one."""
        raise NotImplementedError

    def reading(self, of: Functional) -> Regularizer:  # noqa: ARG002
        """The regularizer that solves for the functional `of`; itself, where a solution serves all of them."""
        return self

    def rows_at_once(self, objective: Objective, n_outputs: int) -> int | None:  # noqa: ARG002
        """How many query rows to solve for together; None for all of them."""
        return None


def checked_count(name: str, value: int) -> int:
    """A whole number >= 1."""
    return checked_integer(name, value, at_least=1, remedy="16 is a good start.")


def probe_generator(objective: Objective, seed: int) -> torch.Generator:
    """A generator on the device of θ, from a seed field."""
    return torch.Generator(objective.theta.device).manual_seed(seed)
