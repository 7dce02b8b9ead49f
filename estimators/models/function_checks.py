"""Checks that the function of a network is that of the user's module: at each row alone, and at displaced weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import grad

from estimators.errors import DependentRowsError, ModelChangedError, ModelError
from estimators.models.derivative_routes import BY_IDENTITY, BY_NAME
from estimators.models.disagreement import largest_parameter_error, relative_error
from estimators.models.kernels import differentiable
from estimators.models.network import Network
from estimators.models.self_check import DISPLACED, OUTPUTS, SelfCheck
from estimators.models.user_module import UserModule
from estimators.numerics.pytrees import PyTree, n_rows, select_rows

__all__ = ["check_displaced_outputs", "check_outputs", "check_parameter_swap", "check_query"]

_QUERY = "query"
_ROWS_ALONE = 3
"""Rows of each batch that are computed alone. A branch on the mean of a batch shows at every other row."""
_STEPS = {torch.float64: (1e-6, 1e-5, 1e-4)}
_DEFAULT_STEPS = (1e-3, 1e-2)
"""Displacements in finite differences, relative to the mean size of each parameter, by dtype; the best counts."""
_SIZE_OF_ZEROS = 1e-3
"""The size of parameters that are all 0."""
_MOST_AT_KINKS = 0.05
"""Largest share of rows at a kink with which a network can be refitted."""
_AWAY_FROM_KINKS = 0.03
"""Distance from the weights to where finite differences are taken a second time, relative to their mean sizes.

About one fit in 40 on networks 8-50-1 has a row so close to the kink of a ReLU that the smallest step crosses it.
"""
_DIFFERENCE_TOLERANCE = {torch.float64: 1e-3}
_DEFAULT_DIFFERENCE_TOLERANCE = 0.2
"""Largest relative error of a finite difference, by dtype. In float32 most digits of two outputs cancel."""


def check_outputs(network: Network, x: PyTree, f: Tensor, *, what: str = "training row") -> Tensor:
    """Check that outputs f of the network at x are those of the user's module, and that rows do not depend on others.

    Args:
        network: the network, whose module is a copy of the user's.
        x: inputs of B rows.
        f: outputs (B, ...) of the network.
        what: "training row" or "query", for error messages.

    Returns:
        f, or the outputs of the user's module if these differ. The network then calls the user's module from now on.

    Raises:
        DependentRowsError: the outputs of a row depend on the other rows.
        ModelChangedError: at a query, the user's module is no longer the function that was fitted.
    """
    check = network.check
    if not check.enabled:
        return f
    with check.counted():
        error = _rows_alone_error(check, x, f)
        if error <= check.tolerance():
            check.report.record_agreement(OUTPUTS, n_rows(x), error)
            return f
        # They differ: because of the copy, of the other rows, or of randomness.
        expected = check.reference.outputs(x)
        if not torch.equal(expected, check.reference.outputs(x)):
            return f  # random: the two passes over the data detect it
        error = _rows_alone_error(check, x, expected)
        if not error <= check.tolerance():
            raise _dependent_rows(what, f"outputs of a row alone that differ by {error:.2g} of the largest output")
        if torch.equal(expected, f):
            return expected
        if what == _QUERY:
            raise ModelChangedError(
                "the function that was fitted",
                received="a module whose outputs at this query are not those of its copy from the fit",
                remedy="fit again after changing hooks, attributes or submodules; load around the fitted network.",
            )
        network.use_user_module("differ from those of the module")
        return expected


def check_query(network: Network, x: PyTree, f: Tensor) -> Tensor:
    """Check the outputs f (B, ...) at a query x as `check_outputs` does, and return them."""
    return check_outputs(network, x, f, what=_QUERY)


def _rows_alone_error(check: SelfCheck, x: PyTree, f: Tensor) -> float:
    """The largest error of the module's outputs at some rows alone against f (B, ...), relative to the largest output.

    Some rows are computed alone, and a random quarter of the rows together: rows may depend on each other for some
    values only. A module that takes no single row is given the quarter; the error is 0 if it does not take this either.
    """
    rows = check.random_order(len(f)).to(f.device)
    parts = [*rows[:_ROWS_ALONE].split(1), rows[: len(f) // 4]]
    return max((_part_error(check, x, f, part.sort().values) for part in parts if len(part)), default=0.0)


def _part_error(check: SelfCheck, x: PyTree, f: Tensor, rows: Tensor) -> float:
    """The largest error of the module's outputs at these rows of x against f[rows], relative to the largest output."""
    try:
        alone = check.reference.outputs(select_rows(x, rows))
    except (RuntimeError, IndexError):
        return 0.0
    except ValueError as error:
        if "more than 1 value" in str(error):  # batch statistics of one value
            raise _dependent_rows("row", "batch normalisation over the rows of a batch") from error
        return 0.0
    return relative_error(_largest_difference(alone, f[rows]), float(f.abs().double().max()) if f.numel() else 0.0)


def check_displaced_outputs(network: Network, x: PyTree, *, refits: bool = False) -> None:
    """Check that the outputs f(θ, x) of displaced weights follow the gradient of the user's module.

    Args:
        network: the network.
        x: inputs of B rows.
        refits: whether derivatives at the trained weights matter, so that few rows may be at a kink there.

    Raises:
        ModelError: they do not, so that the network cannot be refitted.
    """
    check, theta = network.check, network.theta
    if not check.is_due(DISPLACED, x):
        return
    with check.counted():
        network.vjp(x, network.outputs(x)[None] * 0 + 1)  # finds out whether parameters are swapped by identity
        with differentiable():
            with torch.no_grad():
                f = network(theta, x)
            u = check.random(f)
            g = check.reference.vjp(x, u[None])[0]
            slope = grad(lambda theta: (u * network(theta, x)).sum())
            found = largest_parameter_error(check.subset.entries, slope(theta).detach(), g)
            smallest = _smallest_difference_error(network, x, u, theta, g)
            tolerance, at_kinks = _DIFFERENCE_TOLERANCE.get(theta.dtype, _DEFAULT_DIFFERENCE_TOLERANCE), 0.0
            if smallest > tolerance:
                at_kinks = _share_at_kinks(network, x, g, tolerance) if refits else 0.0
                # A unit without weights is on the kink of its ReLU at every row, and a row may be beside one. There the
                # difference is not the gradient; at other weights it is.
                nearby = theta + _AWAY_FROM_KINKS * _direction(network)
                smallest = _smallest_difference_error(network, x, u, nearby, slope(nearby).detach())
        network.pass_counter.backward(n_rows(x))
    if not found.within(check.tolerance()):
        raise _not_displaceable(f"a gradient of displaced weights that {found}")
    if smallest > tolerance:
        raise _not_displaceable(f"outputs that differ from it by {smallest:.2g}")
    if at_kinks > _MOST_AT_KINKS:
        raise _not_displaceable(f"{at_kinks:.0%} of the rows at a kink of the network, such as a tie")
    check.report.record_agreement(DISPLACED, n_rows(x), 0.0)


def _direction(network: Network) -> Tensor:
    """A random direction (P,), in each parameter of its own mean size; if that is 0, of that of the smallest matrix.

    Weights may be of very different sizes: the last layer of a regression on house prices has numbers of 10⁵, and a
    step of their size in the other layers would leave the linear range. Biases and factors that are 0 move as well.
    """
    subset, theta = network.subset, network.theta
    parts = theta.split(subset.sizes)
    sizes = torch.stack([part.abs().mean() if len(part) else part.new_zeros(()) for part in parts])
    is_matrix = torch.tensor([len(shape) > 1 for shape in subset.shapes.values()], device=sizes.device)
    some = sizes > 0
    known = sizes[some & is_matrix if bool((some & is_matrix).any()) else some]
    floor = known.min() if len(known) else sizes.new_tensor(_SIZE_OF_ZEROS)
    sizes = torch.where(some, sizes, floor)
    scale = torch.cat([size.expand(len(part)) for size, part in zip(sizes, parts, strict=True)])
    return network.check.random(theta) * scale


def _share_at_kinks(network: Network, x: PyTree, g: Tensor, tolerance: float) -> float:
    """The share of rows whose outputs do not follow J r in a random direction r of the weights with a gradient g (P,).

    A refit does not move weights without a gradient, such as those of a unit that is on the kink of its ReLU.
    """
    r = _direction(network) * (g != 0)
    expected = network.jvp(x, r[None])[0].double()
    errors = [(found - expected).abs().amax(1) for found in _central_differences(network, x, network.theta, r)]
    smallest = torch.stack(errors).amin(0)
    return float((smallest > tolerance * expected.abs().max()).double().mean())


def _smallest_difference_error(network: Network, x: PyTree, u: Tensor, theta: Tensor, g: Tensor) -> float:
    """The error of ⟨u, f(θ + εr) − f(θ − εr)⟩ / 2ε against ⟨g, r⟩ in a random direction r, at the best ε."""
    r = _direction(network)
    terms = g.double() * r.double()
    derivatives = [(u.double() * found).sum() for found in _central_differences(network, x, theta, r)]
    return min(relative_error(float((found - terms.sum()).abs()), float(terms.norm())) for found in derivatives)


def _central_differences(network: Network, x: PyTree, theta: Tensor, r: Tensor) -> list[Tensor]:
    """The derivative of the outputs at θ along r by central differences, (B, C) in float64, for each step."""
    found = []
    for step in _STEPS.get(theta.dtype, _DEFAULT_STEPS):
        with torch.no_grad():
            difference = network(theta + step * r, x).double() - network(theta - step * r, x).double()
        found.append(difference / (2 * step))
    return found


def check_parameter_swap(network: Network, x: PyTree, tensors: dict[str, Tensor], trained: nn.Module) -> None:
    """Check that these tensors in place of the network's own make it the `trained` network at x.

    Args:
        network: the network; it swaps parameters by identity afterwards if only that is right.
        x: inputs of B rows.
        tensors: parameters and buffers of `trained`, by name.
        trained: a module with the same architecture.

    Raises:
        ModelError: the outputs differ, so that the trained network cannot be kept as its tensors.
    """
    expected = UserModule(trained, network.subset).outputs(x).flatten(1)
    for swap in (BY_IDENTITY, BY_NAME):  # by identity first: it misses no use of a tensor, whatever the inputs
        network.routes.swap = swap
        with torch.no_grad(), network.check.counted():
            error = _largest_difference(network.functional_outputs(tensors, x), expected)
        if error <= network.check.tolerance() * float(expected.double().abs().max().clamp_min(1e-300)):
            return
    raise ModelError(
        "networks that differ in the parameters and buffers of their modules only",
        received=f"one whose outputs differ by {error:.2g} from those of its tensors in the module that was passed",
        remedy="register every tensor that training changes as a parameter or buffer of a submodule.",
    )


def _largest_difference(f: Tensor, expected: Tensor) -> float:
    """The largest difference between two tensors; infinite if their shapes differ."""
    if f.shape != expected.shape:
        return float("inf")
    return float((f.double() - expected.double()).abs().max()) if f.numel() else 0.0


def _not_displaceable(received: str) -> ModelError:
    """The error for weights that cannot be displaced."""
    return ModelError(
        "weights that can be displaced: outputs that move along the gradient of the network",
        received=f"{received} (a weight inside torch.no_grad(), a padding row of an embedding, a gradient hook, or a "
        "weight of a compiled or scripted part)",
        remedy="solver=LinearResponse(), which displaces no weight; or freeze weights without a gradient by "
        "requires_grad_(False), and register every module as a submodule.",
    )


def _dependent_rows(what: str, received: str) -> DependentRowsError:
    """The error for rows whose outputs depend on the other rows."""
    return DependentRowsError(
        f"a network whose outputs at a {what} do not depend on the other rows",
        received=received,
        remedy="use running statistics in batch normalisation (track_running_stats=True), batch_first=True in encoders "
        "that are given (B, T, C), and no mean or softmax over dimension 0.",
    )
