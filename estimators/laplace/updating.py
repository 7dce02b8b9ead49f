"""`update`: new training rows added to a fit, at the same weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Any, Self

from estimators.data.training_data import AbsentTrainingData, TrainingData
from estimators.estimator.base import UncertaintyEstimator
from estimators.models.exclusive import exclusively
from estimators.models.network import Network
from estimators.objective.objective import Objective
from estimators.persistence.checksums import DatasetChecksum
from estimators.persistence.weight_checksum import check_unchanged
from estimators.runtime.rng import preserved_random_state

__all__ = ["UpdateMixin"]


class UpdateMixin(UncertaintyEstimator):
    """`update` for estimators whose curvature is a sum over rows. A subclass implements `_add_rows`."""

    @exclusively
    def update(self, new_loader: Iterable[Any]) -> Self:
        """Add training rows to this fit, in one pass over the new rows. The weights of the network stay the same.

        The result is the fit on all rows together. `SubnetworkLaplace` that chooses its weights by their variance
        chooses again, which needs the earlier rows, too. So does `fisher="mc"`, since sampled labels differ between
        rows with equal inputs. After new training of the network, call `fit` instead. If `update` raises an error, the
        fit is as before.

        The prior precision and the calibration that `fit` chose on validation rows are kept: `calibration_` is that of
        the earlier rows. `fit(train_loader, val_loader=...)` on all rows chooses again.

        Args:
            new_loader: the new rows, a re-iterable as for `fit`, without the rows of the fit.

        Returns:
            This estimator, over all rows.

        Raises:
            UnsupportedError: for a structure that is not a sum over rows ("kron", "ekfac", "lowrank"), or an inverse
                that needs passes over the data.
            IndefiniteHessianError: for `curvature="hessian"` that is indefinite over all rows.
            NotFittedError: before `fit`; and if a fit that needs its rows was loaded without them.
            ModelChangedError, DataError, NonDeterministicError: as `fit`.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from estimators import LastLayerLaplace
            >>> x, y = torch.randn(20, 3), torch.randn(20, 2)
            >>> laplace = LastLayerLaplace(nn.Linear(3, 2), "regression").fit([(x[:10], y[:10])])
            >>> laplace.update([(x[10:], y[10:])]).n_data_
            20
        """
        self._check_fitted()
        check_unchanged(self.model, self.weight_checksum_, self.network_.params)
        self._check_updatable()
        network, fitted = self.network_, self.objective_
        with preserved_random_state(), _counts_of_rows(network):
            n_checked = network.check.n_data
            new = TrainingData.checked(new_loader, network, self.likelihood)
            objective = replace(fitted, batches=new)
            try:
                with network.check.on_training_rows():
                    network.record_training_rows(n_checked + new.n_data)
                    combined = replace(fitted, batches=_combined(fitted.batches, new))
                    self._add_rows(objective, combined)
            finally:
                network.check.forget_gradients()
        self.objective_ = combined
        self._report_derivatives(combined)
        return self

    @abstractmethod
    def _check_updatable(self) -> None:
        """Raise UnsupportedError if the curvature is not a sum over rows, NotFittedError if it needs absent rows."""

    @abstractmethod
    def _add_rows(self, new: Objective, combined: Objective) -> None:
        """Add the curvature of the new rows; `combined` is the objective over all rows.

        If it raises, the fit is as before: it computes everything before it sets an attribute.
        """


@contextmanager
def _counts_of_rows(network: Network) -> Iterator[None]:
    """Restore the number of training rows, and of those that were compared with plain autograd, after an error."""
    check = network.check
    n_data, compared = check.n_data, dict(check.report.rows)
    try:
        yield
    except BaseException:
        check.n_data, check.report.rows = n_data, compared
        raise


@dataclass(frozen=True)
class _Chain:
    """The batches of two loaders, one after the other."""

    first: Iterable[Any]
    other: Iterable[Any]

    def __iter__(self) -> Iterator[Any]:
        yield from self.first
        yield from self.other


def _combined(fitted: TrainingData, new: TrainingData) -> TrainingData:
    """Return the data of both; without rows if those of the fit are absent."""
    n_data = fitted.n_data + new.n_data
    assert fitted.checksum is not None
    assert new.checksum is not None
    sums = zip(astuple(fitted.checksum), astuple(new.checksum), strict=True)
    checksum = DatasetChecksum(*(a + b for a, b in sums))
    layout = replace(fitted.layout, unequal=fitted.layout.unequal | new.layout.shared)
    if isinstance(fitted, AbsentTrainingData):
        return AbsentTrainingData((), n_data, checksum=checksum, layout=layout)
    stored = None if fitted.stored is None or new.stored is None else (*fitted.stored, *new.stored)
    return TrainingData(_Chain(fitted.loader, new.loader), n_data, stored, checksum, layout)
