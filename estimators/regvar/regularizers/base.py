"""The interface of a regularizer: functions r_k(θ) that are added to the loss, and a variance from the responses."""

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
from estimators.regvar.perturbation import Perturbation
from estimators.regvar.solvers.base import Solution
from estimators.regvar.variance_estimate import VarianceEstimate

__all__ = ["MakeEstimate", "RegularizedProblem", "Regularizer", "probe_generator"]

MakeEstimate = Callable[[Solution], VarianceEstimate]
RegularizedProblem = tuple[Perturbation, MakeEstimate]


class Regularizer(ABC):
    """Base class of regularizers: scalar functions r_k(θ), k = 1 ... K, and the variance estimate from their responses.

    The training loss plus a small multiple of r_k has its minimum elsewhere. Per unit of the multiple, the weights move
    by the displacement A⁻¹∇r_k(θ̂), and the outputs at x by the *response* J(x) A⁻¹∇r_k(θ̂). For r_k = f_c(x) the
    response of f_c(x) is its variance; `docs/math.md`, section 4, has the other choices.

    A regularizer *at fit* (`at_query` False) is solved in `fit`; later queries need no training data. A regularizer
    *at query* is solved in `variance(x)`, so that the fitted estimator keeps the training data.
    """

    at_query: ClassVar[bool] = False
    """Whether `variance` solves, rather than `fit`."""
    batch_dependent: ClassVar[bool] = False
    """Whether the variance at a row depends on the other rows that are passed with it."""
    needs_ggn: ClassVar[bool] = False
    """Whether the estimate is right for curvature "ggn" only."""
    signed: ClassVar[bool] = False
    """Whether estimates may be negative; `predict` replaces negative ones by 0."""

    @abstractmethod
    def build_problem(self, objective: Objective, x: PyTree = None) -> RegularizedProblem:
        """Return the perturbation to solve for, and the function that makes the variance estimate.

        Args:
            objective: the centred objective.
            x: query inputs, M rows; None for regularizers at fit.

        Returns:
            The perturbation with its K functions, and a function from the solver's solution to a variance estimate.
        """

    def restore_estimate(
        self, network: Network, tensors: dict[str, Tensor], learned: dict[str, Any]
    ) -> VarianceEstimate:
        """Return the variance estimate of a saved fit; regularizers at query have none.

        Args:
            network: the network with the fitted parameters.
            tensors: tensors of `VarianceEstimate.state`.
            learned: JSON values of `VarianceEstimate.state`.

        Returns:
            The variance estimate, as `fit` had made it.

        Raises:
            NotImplementedError: for regularizers at query.
        """
        raise NotImplementedError

    def for_functional(self, of: Functional) -> Regularizer:  # noqa: ARG002
        """Return the regularizer that solves for the functional g.

        Args:
            of: g, a function of the outputs of one row, (C,), that returns a tensor (D,).

        Returns:
            This regularizer, if one solution serves every functional; else a new one.
        """
        return self

    def rows_per_solve(self, objective: Objective, n_outputs: int) -> int | None:  # noqa: ARG002
        """Return the number of query rows that are solved for together.

        Args:
            objective: the centred objective.
            n_outputs: C, outputs per row.

        Returns:
            The number of rows, or None for all rows.
        """
        return None


def probe_generator(objective: Objective, seed: int) -> torch.Generator:
    """Return a random generator on the device of θ, seeded with `seed`."""
    return torch.Generator(objective.theta.device).manual_seed(seed)
