"""Batches and queries that the network or the likelihood cannot take, raised at the boundary, with batch and row."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from estimators.data.batch import Batch
from estimators.errors import DataError, EstimatorError, NotLogitsWarning
from estimators.likelihoods import Likelihood
from estimators.likelihoods.link_check import REMEDY, LinkCheck
from estimators.models.network import Network
from estimators.models.outputs import output_tensor
from estimators.numerics.pytrees import PyTree, forward_arguments, row_tensors, tensors_of
from estimators.numerics.reductions import is_finite

__all__ = ["check_batch", "check_finite", "check_inputs", "check_targets", "naming_batch", "warn_of_probabilities"]


@contextmanager
def naming_batch(index: int) -> Iterator[None]:
    """Add the index of the batch in the loader to errors that are raised inside."""
    try:
        yield
    except EstimatorError as error:
        error.at(f"in batch {index} of the loader (batches and rows are counted from 0)")
        raise


def check_batch(batch: Batch, network: Network, likelihood: Likelihood) -> Tensor:
    """Return the outputs (B, ...) at θ̂ of a valid batch; raise DataError for an invalid one."""
    f = check_inputs(batch.x, network, what="training batch")
    if batch.y.device != network.theta.device:
        raise DataError(
            f"targets on the device of the model, {network.theta.device}",
            received=f"{batch.y.device}",
            remedy="move both to one device: y.to(device).",
        )
    known = batch.y.dtype in network.target_dtypes
    check_targets(f.to(batch.y.dtype) if known else f, batch.y, likelihood)
    return f


def check_targets(f: Tensor, y: Tensor, likelihood: Likelihood) -> None:
    """Raise DataError unless y can be the targets of outputs f; the message names the first row that is wrong."""
    _check_finite_targets(y)
    if y.shape[:1] != f.shape[:1]:
        raise DataError(
            f"one target for each of the {f.shape[0]} rows",
            received=f"{tuple(y.shape)}",
            remedy="check the loader.",
        )
    try:
        likelihood.check_targets(f, y)
    except DataError as error:
        row = _first_failing_row(f, y, likelihood)
        if row is not None:
            error.at(f"first in row {row}")
        raise


def check_finite(batch: Batch) -> None:
    """Raise DataError for NaN or Inf in the inputs or targets of a batch."""
    for tensor in tensors_of(batch.x):
        _check_finite_inputs(tensor, "batch", has_rows=any(tensor is t for t in row_tensors(batch.x)))
    _check_finite_targets(batch.y)


def check_inputs(x: PyTree, network: Network, *, what: str) -> Tensor:
    """Return the outputs (B, ...) at θ̂ of valid inputs; raise DataError for invalid ones."""
    tensors = tensors_of(x)
    if not tensors:
        raise DataError("inputs with at least one tensor", received=type(x).__name__, remedy="pass tensors.")
    with_rows = row_tensors(x)
    for tensor in tensors:
        _check_kind(tensor, network, what)
        _check_finite_inputs(tensor, what, has_rows=any(tensor is t for t in with_rows))
    try:
        f = network.shaped_outputs(x)
    except EstimatorError:
        raise
    except (RuntimeError, IndexError, TypeError) as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise DataError(
            f"a {what} that the network accepts",
            received=f"inputs of shape {shapes}, for which its forward says: {error}",
            remedy="compare the feature size and shape with those of the training rows; a tuple or list is passed as "
            "one argument, a dict by keywords.",
        ) from error
    _check_finite_outputs(f, what)
    return f


def warn_of_probabilities(link: LinkCheck | None, network: Network) -> None:
    """Warn with NotLogitsWarning if all outputs that `link` has seen look like probabilities, not like logits."""

    def forward(x: PyTree) -> Tensor:
        arguments, keywords = forward_arguments(x)
        return output_tensor(network.module(*arguments, **keywords))

    found = None if link is None else link.found(forward)
    if link is not None and found is not None:
        warnings.warn(
            f"the outputs of the model are {found}; the likelihood {link.likelihood!r} expects logits and applies its "
            f"link itself, so that every number would be of another model. Try: {REMEDY}",
            NotLogitsWarning,
            stacklevel=5,
        )


def _check_kind(tensor: Tensor, network: Network, what: str) -> None:
    theta = network.theta
    if tensor.device != theta.device:
        raise DataError(
            f"a {what} on the device of the model, {theta.device}",
            received=f"a tensor on {tensor.device}",
            remedy="move model and data to one device.",
        )
    if tensor.is_floating_point() and tensor.dtype not in network.input_dtypes:
        raise DataError(
            f"a {what} of the dtype of the model, {' or '.join(map(str, network.input_dtypes))}",
            received=f"{tensor.dtype}",
            remedy=f"x.to({network.input_dtypes[0]}), or convert the model.",
        )


def _check_finite_inputs(tensor: Tensor, what: str, *, has_rows: bool) -> None:
    if not is_finite(tensor):
        row = _first_row_with(~torch.isfinite(tensor)) if has_rows else ""
        raise DataError(
            f"a finite {what}", received=f"NaN or Inf in the inputs{row}", remedy="clean or impute the data."
        )


def _check_finite_targets(y: Tensor) -> None:
    if is_finite(y):
        return
    row = _first_row_with(~torch.isfinite(y))
    remedy = "clean the data."
    if y.ndim > 1 and y[0].numel() > 1:
        remedy = (
            "clean the data; targets that are missing for some outputs (multi-task data) need a finite "
            "number instead, such as -999, and a likelihood of your own whose given(y) and nll(f, y) leave these "
            "outputs out (docs/guide/data.md)."
        )
    raise DataError("finite targets", received=f"a NaN or Inf{row}", remedy=remedy)


def _check_finite_outputs(f: Tensor, what: str) -> None:
    if is_finite(f):
        return
    expected, row = f"finite outputs for the {what}", _first_row_with(~torch.isfinite(f))
    if bool((torch.isfinite(f) | (f == -torch.inf)).all()):
        raise DataError(
            expected,
            received=f"-Inf{row}, as logits of masked classes have",
            remedy="mask with a large finite number, f.masked_fill(mask, -1e4): its softmax is 0, too.",
        )
    raise DataError(expected, received=f"NaN or Inf{row}", remedy="check the weights and the scale of x.")


def _first_row_with(bad: Tensor) -> str:
    """Return the words that name the first row with a True entry."""
    if not bad.ndim:
        return ""
    return f" in row {int(bad.reshape(len(bad), -1).any(1).int().argmax())}"


def _first_failing_row(f: Tensor, y: Tensor, likelihood: Likelihood) -> int | None:
    """Return the first row whose targets alone fail; None if all rows fail, as for a wrong shape or dtype."""
    failing = [i for i in range(len(y)) if _row_fails(f[i : i + 1], y[i : i + 1], likelihood)]
    return failing[0] if failing and (len(failing) < len(y) or len(y) == 1) else None


def _row_fails(f: Tensor, y: Tensor, likelihood: Likelihood) -> bool:
    try:
        likelihood.check_targets(f, y)
    except DataError:
        return True
    return False
