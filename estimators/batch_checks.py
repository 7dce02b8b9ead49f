"""Batches and queries refused at the boundary where the network or the likelihood could not bear them."""

from __future__ import annotations

import warnings

from torch import Tensor

from estimators.batch import Batch
from estimators.errors import DataError, EstimatorError, NotLogitsWarning
from estimators.finite import is_finite
from estimators.likelihoods import Likelihood
from estimators.likelihoods.link_check import REMEDY, LinkCheck
from estimators.models.outputs import output_tensor
from estimators.network import Network
from estimators.pytrees import PyTree, tensors_of

__all__ = ["check_batch", "check_inputs", "warn_of_probabilities"]


def check_batch(batch: Batch, network: Network, likelihood: Likelihood) -> Tensor:
    """Outputs (B, ...) at θ̂ of a valid batch; DataError for an invalid one."""
    f = check_inputs(batch.x, network, what="training batch")
    if batch.y.device != network.theta.device:
        raise DataError(
            f"targets on the device of the model, {network.theta.device}",
            received=f"{batch.y.device}",
            remedy="move both to one device: y.to(device).",
        )
    if not is_finite(batch.y):
        raise DataError("finite targets", received="a NaN or Inf", remedy="clean the data.")
    if batch.y.shape[:1] != f.shape[:1]:
        raise DataError(
            f"one target for each of the {f.shape[0]} rows",
            received=f"{tuple(batch.y.shape)}",
            remedy="check the loader.",
        )
    likelihood.check_targets(f, batch.y)
    return f


def check_inputs(x: PyTree, network: Network, *, what: str) -> Tensor:
    """Outputs (B, ...) at θ̂ of valid inputs; DataError for invalid ones."""
    tensors = tensors_of(x)
    if not tensors:
        raise DataError("inputs with at least one tensor", received=type(x).__name__, remedy="pass tensors.")
    for tensor in tensors:
        _check_tensor(tensor, network.theta, what)
    try:
        f = network.shaped_outputs(x)
    except EstimatorError:
        raise
    except (RuntimeError, IndexError, TypeError) as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise DataError(
            f"a {what} that the network accepts",
            received=f"inputs of shape {shapes}, for which its forward says: {error}",
            remedy="compare the feature size and shape with those of the training rows.",
        ) from error
    if not is_finite(f):
        raise DataError(
            f"finite outputs for the {what}", received="NaN or Inf", remedy="check the weights and the scale of x."
        )
    return f


def _check_tensor(tensor: Tensor, theta: Tensor, what: str) -> None:
    if tensor.device != theta.device:
        raise DataError(
            f"a {what} on the device of the model, {theta.device}",
            received=f"a tensor on {tensor.device}",
            remedy="move model and data to one device.",
        )
    if tensor.is_floating_point():
        if tensor.dtype != theta.dtype:
            raise DataError(
                f"a {what} of the dtype of the model, {theta.dtype}",
                received=f"{tensor.dtype}",
                remedy=f"x.to({theta.dtype}), or convert the model.",
            )
        if not is_finite(tensor):
            raise DataError(f"a finite {what}", received="NaN or Inf in the inputs", remedy="clean or impute the data.")


def warn_of_probabilities(link: LinkCheck | None, network: Network) -> None:
    """NotLogitsWarning if all outputs that `link` has seen look like probabilities, not like logits."""

    def forward(x: PyTree) -> Tensor:
        arguments, keywords = ((), x) if isinstance(x, dict) else ((x,), {})
        return output_tensor(network.module(*arguments, **keywords))

    found = None if link is None else link.found(forward)
    if link is not None and found is not None:
        warnings.warn(
            f"the outputs of the model are {found}; the likelihood {link.likelihood!r} expects logits and applies its "
            f"link itself, so that every number would be of another model. Try: {REMEDY}",
            NotLogitsWarning,
            stacklevel=5,
        )
