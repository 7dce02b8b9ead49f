"""Per-row Jacobians in factors, layer by layer.

A linear map with inputs a and gradients b with respect to its output has J = Σ_t b_t a_tᵀ over the positions t that it
is applied to (tokens, pixels, repeated calls), and the product need not be made. Rows are taken one at a time inside
`vmap`, so that it does not matter where a layer keeps its batch dimension. All other parameters (norms, embeddings, raw
tensors) have plain Jacobian rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.func import vjp, vmap

from estimators.errors import EstimatorError, UnsupportedError
from estimators.models.batch_factors import BatchFactors
from estimators.models.derivative_routes import plain_autograd
from estimators.models.disagreement import Disagreement
from estimators.models.failures import FAILURES
from estimators.models.jacobian_factors import FACTORS, JacobianFactors, LayerwiseRows, rows_differ
from estimators.models.kernels import differentiable
from estimators.models.layer_layout import Layout
from estimators.models.linear_calls import LinearCall, LinearCallTracer, LinearMap
from estimators.models.network import Network, weighted
from estimators.models.subsets import complex_of
from estimators.numerics.pytrees import PyTree, n_rows, row_as_batch, select_rows, split_rows, tensors_of
from estimators.numerics.vectorize import over_rows
from estimators.runtime.memory import rows_per_chunk

__all__ = ["LayerwiseJacobian"]

_NO_PRODUCTS = {
    *("embedding", "embedding_bag", "add", "__add__", "__radd__", "__iadd__", "add_", "layer_norm", "group_norm"),
    *("__getitem__", "expand", "expand_as", "unsqueeze"),
}
"""Names of functions that use a weight otherwise than as a factor of a product with the activations."""


class Cotangents(Protocol):
    """Makes K cotangents per row, (M, K, C), from outputs f (M, C) and targets with rows."""

    def __call__(self, f: Tensor, targets: PyTree) -> Tensor: ...


class LayerwiseJacobian:
    """The linear maps of a network by the name of their weight, and its other parameters; found by one forward.

    Args:
        network: the network.
        x: inputs, of which the first row is used.
        maps: the linear maps of a fit, of which a query may use only some; None finds them.

    Raises:
        UnsupportedError: `maps` are given, and x uses their weights in other ways.
    """

    def __init__(self, network: Network, x: PyTree, maps: dict[str, LinearMap] | None = None) -> None:
        self.network = network
        self._params = {name: param.clone() for name, param in network.params.items()}
        tracer = self._trace(select_rows(x, slice(0, 1)))
        self.maps = _usable_maps(tracer) if maps is None else maps
        self._check_calls(tracer)
        covered = {name for linear in self.maps.values() for name in linear.names}
        self.other_params = [name for name in self._params if name not in covered]
        self._of_batches = BatchFactors(network, self.maps, self.other_params)

    def _trace(self, row: PyTree) -> LinearCallTracer:
        """Trace the forward of one row, and keep its calls and its number of outputs."""
        try:
            f, tracer = self._forward(row)
        except EstimatorError:
            raise
        except FAILURES:  # inside a function mode; the network itself has computed outputs before
            f, tracer = self.network.outputs(row), LinearCallTracer(self._params)
        self.n_outputs, self._calls, self._traced_shapes = f.shape[-1], tracer.calls, _shapes_of(row)
        self._functions = tracer.functions
        return tracer

    @property
    def layout(self) -> Layout:
        """Where the maps and the other parameters lie in θ."""
        return Layout(self.network.subset, self.maps, self.other_params)

    @property
    def other_products(self) -> list[str]:
        """Names of other parameters that may be factors of products, in no known way or in several ways.

        Embeddings, shifts, and parameters with one dimension (scales of norms) are left out.
        """
        linear = {call.map.weight for call in self._calls}

        def is_factor(name: str) -> bool:
            is_matrix = sum(size > 1 for size in self._params[name].shape) > 1
            return is_matrix and (name in linear or not self._functions.get(name, {""}) <= _NO_PRODUCTS)

        return [name for name in self.other_params if is_factor(name)]

    @property
    def no_weight_sharing(self) -> bool:
        """Whether the last traced row used each map once, at one position, and most parameters are in maps."""
        calls = [call for call in self._calls if call.map.weight in self.maps]
        at_one_position = all(len(call.inputs) == 1 for call in calls)
        in_maps = sum(o * e for o, e in (linear.shape for linear in self.maps.values()))
        once = at_one_position and sorted(call.map.weight for call in calls) == sorted(self.maps)
        return once and 2 * in_maps >= self.network.n_parameters

    def n_positions(self) -> dict[str, int]:
        """T, the number of positions that each map is applied to in the last traced row."""
        found = dict.fromkeys(self.maps, 0)
        for call in self._calls:
            if call.map.weight in found:
                found[call.map.weight] += len(call.inputs)
        return found

    def bytes_per_row(self) -> dict[str, int]:
        """Memory of the factors of one row, for as many cotangents as outputs, by map, from the last traced row."""
        element = self.network.theta.element_size()
        found = dict.fromkeys(self.maps, 0)
        for call in self._calls:
            if call.map.weight in found:
                gradients = self.n_outputs * call.output_shape.numel()
                found[call.map.weight] += element * (call.augmented_inputs().numel() + gradients)
        return found

    def rows_at(
        self,
        x: PyTree,
        cotangents: Cotangents | None = None,
        targets: PyTree = None,
        *,
        n_cotangents: int | None = None,
        pooled: bool = False,
    ) -> Iterator[LayerwiseRows]:
        """Yield the Jacobian rows at x, a chunk of rows at a time.

        Args:
            x: inputs of B rows.
            cotangents: makes K cotangents per row from outputs and targets; None takes each output.
            targets: what `cotangents` needs besides the outputs, a pytree with rows.
            n_cotangents: K, from which the size of a chunk follows; None for as many as outputs.
            pooled: whether inputs and gradients are needed at one position only, as `JacobianFactors.pooled`.

        Raises:
            UnsupportedError: rows use the layers in different ways, or a weight where the layers do not show it.
        """
        row = select_rows(x, slice(0, 1))
        if _shapes_of(row) != self._traced_shapes:
            self._check_calls(self._trace(row))
        k = self.n_outputs if n_cotangents is None else n_cotangents
        size = self._chunk_size(k)
        if cotangents is None:
            eye = torch.eye(self.n_outputs, dtype=self.network.theta.dtype, device=self.network.theta.device)
            for chunk in split_rows(x, size):
                yield self._compared_rows(chunk, eye.expand(n_rows(chunk), -1, -1), k)
            return
        rows_of_a_part = self._of_batches.chunk_size(self._calls, self._functions, k)
        for part, of_part in split_rows((x, targets), rows_of_a_part or size):
            made = partial(cotangents, targets=of_part)
            if rows_of_a_part:
                batch = self._of_batches.rows_at(part, made, self._calls, self._checked_rows, pooled=pooled)
                if batch is not None:
                    yield from batch.chunks(size, pooled=pooled)
                    continue
            for chunk, of_chunk in split_rows((part, of_part), size):
                rows = self._compared_rows(chunk, partial(cotangents, targets=of_chunk), k)
                yield rows.pooled() if pooled else rows

    def _chunk_size(self, n_cotangents: int) -> int:
        """How many rows one vectorised call takes."""
        inputs = sum(call.inputs.numel() for call in self._calls)
        outputs = sum(call.output_shape.numel() for call in self._calls)
        others = sum(self._params[name].numel() for name in self.other_params)
        element = self.network.theta.element_size()
        return rows_per_chunk(element * (2 * inputs + 3 * n_cotangents * (outputs + others)))

    def _compared_rows(self, x: PyTree, cotangents: Tensor | Callable[[Tensor], Tensor], k: int) -> LayerwiseRows:
        """Jacobian rows at x for K cotangents (M, K, C), or a function of the outputs that makes them.

        If it is due, Σ c b aᵀ of random c (M, K) is compared with Jᵀ(Σ c u) by plain autograd on the user's module.
        If a function makes the cotangents, the outputs of this module are its argument, which saves a forward pass.

        Raises:
            UnsupportedError: a weight is used where the layers do not show it.
        """
        check = self.network.check
        if not check.is_due(FACTORS, x, k):
            made_here = cotangents if isinstance(cotangents, Tensor) else cotangents(self.network.outputs(x))
            return self._rows(x, made_here)
        if isinstance(cotangents, Tensor):
            rows = self._rows(x, cotangents)
            self._record(x, rows, cotangents)
            return rows
        made: list[tuple[Tensor, Tensor]] = []
        state = check.random_state()

        def weighted_cotangent(f: Tensor) -> Tensor:
            u = cotangents(f.to(self.network.theta.dtype))
            made.append((u, check.random(u[..., 0])))
            return torch.einsum("mk,mkc->mc", made[0][1], u)

        with plain_autograd():
            u, g = check.cotangent_and_gradient(x, weighted_cotangent)
        rows = self._rows(x, made[0][0])
        found = check.gradient_error(x, u, self._contracted(rows, made[0][1]), expected=g)
        self._record(x, rows, made[0][0], (found, state))
        return rows

    def _error(self, x: PyTree, rows: LayerwiseRows, cotangents: Tensor, weights: Tensor | None = None) -> Disagreement:
        """The error of Jacobian rows against plain autograd, with weights (M,) of the rows of x."""
        c = weighted(self.network.check.random(cotangents[..., 0]), weights)
        u = torch.einsum("mk,mkc->mc", c, cotangents)
        return self.network.gradient_error(x, u, self._contracted(rows, c))

    def _checked_rows(self, x: PyTree, cotangents: Tensor) -> LayerwiseRows:
        """Jacobian rows at x, vectorised over rows; raise UnsupportedError if they disagree with plain autograd."""
        rows = self._rows(x, cotangents)
        self._agreed_error(x, rows, cotangents)
        return rows

    def _record(
        self, x: PyTree, rows: LayerwiseRows, cotangents: Tensor, compared: tuple[Disagreement, Tensor] | None = None
    ) -> None:
        """Record a comparison of the factors at x; raise UnsupportedError if they disagree with plain autograd."""
        error = self._agreed_error(x, rows, cotangents, compared)
        self.network.check.report.record_agreement(FACTORS, n_rows(x), error)
        self.network.check.report.routes[FACTORS] = "torch.func, vectorised over rows"

    def _agreed_error(
        self, x: PyTree, rows: LayerwiseRows, cotangents: Tensor, compared: tuple[Disagreement, Tensor] | None = None
    ) -> float:
        """The error of factors that agree with plain autograd other than at rows with kinks.

        `compared` is the error and the random state before it, if they are known.

        Raises:
            UnsupportedError: they disagree.
        """
        check, of_rows = self.network.check, partial(self._error, x, rows, cotangents)
        if compared is None:
            state = check.random_state()
            compared = of_rows(), state
        found, state = compared
        if check.agrees(found, FACTORS, x, of_rows, state):
            return found.error
        check.report.disagreements.append(f"{FACTORS}: {found}; the forms without factors are used where they exist")
        raise _hidden_use(f"factors of layers whose gradient {found}")

    def _rows(self, x: PyTree, cotangents: Tensor) -> LayerwiseRows:
        """Jacobian rows at all rows of x in one vectorised call."""
        rows, k = cotangents.shape[:2]
        with differentiable(), self.network.pass_counter.transformed(forward=rows, backward=rows * k) as counted:
            try:
                inputs, gradients, others = over_rows(counted(self._single_row), x, cotangents)
            except EstimatorError:
                raise
            except FAILURES as error:
                raise _hidden_use(f"layers that cannot be differentiated in a vectorised call ({error})") from error
        return LayerwiseRows(self._joined(inputs, gradients, cotangents), others.detach())

    def _contracted(self, rows: LayerwiseRows, c: Tensor) -> Tensor:
        """Σ_mk c J, (P,)."""
        layout, total = self.layout, torch.zeros_like(self.network.theta)
        for name, factors in rows.factors.items():
            b = torch.einsum("mk,mkto->mto", c.to(factors.gradients), factors.gradients)
            layout.put(total, name, (b.flatten(0, 1).T @ factors.inputs.flatten(0, 1)).to(total))
        if self.other_params:
            others = torch.einsum("mk,mkp->p", c.to(rows.other_rows), rows.other_rows)
            total[layout.other_index.to(total.device)] = others.to(total)
        return total

    def _single_row(self, row: PyTree, cotangents: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Inputs (T, E) and gradients (K, T, O) of every call at one row, and rows (K, P_other)."""
        calls: list[LinearCall] = []

        def forward(offsets: list[Tensor], others: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
            params = {n: complex_of(p) if self._params[n].is_complex() else p for n, p in others.items()}
            f, tracer = self._forward(row_as_batch(row), offsets, params)
            calls[:] = tracer.calls
            self._check_calls(tracer)
            return f[0], [call.augmented_inputs() for call in calls]

        # The gradient by an offset 0 that is added to the output of a call is the gradient by this output.
        offsets = [cotangents.new_zeros(call.output_shape) for call in self._calls]
        others = {name: self._params[name] for name in self.other_params}
        others = {name: torch.view_as_real(p) if p.is_complex() else p for name, p in others.items()}
        _, pull, inputs = vjp(forward, offsets, others, has_aux=True)  # type: ignore[misc]
        pulled, of_others = vmap(pull)(cotangents)
        gradients = [call.by_position(b) for call, b in zip(calls, pulled, strict=True)]
        rows = [of_others[name].reshape(len(cotangents), -1) for name in self.other_params]
        return inputs, gradients, torch.cat([cotangents.new_zeros(len(cotangents), 0), *rows], dim=1)

    def _forward(
        self, x: PyTree, offsets: list[Tensor] | None = None, others: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, LinearCallTracer]:
        """The outputs at x, with `others` in place of some parameters, and the trace of the forward."""
        params = {**self._params, **(others or {})}
        with differentiable(), LinearCallTracer(params, offsets) as tracer:
            return self.network.functional_outputs(params, x), tracer

    def _joined(self, inputs: list[Tensor], gradients: list[Tensor], cotangents: Tensor) -> dict[str, JacobianFactors]:
        """Factors by map: calls of one weight are joined along T, since its Jacobian is their sum.

        A map that these rows do not use has T = 0.
        """
        factors, (m, k, _) = {}, cotangents.shape
        for name, linear in self.maps.items():
            of_map = [i for i, call in enumerate(self._calls) if call.map.weight == name]
            o, e = linear.shape
            a = _cat([inputs[i] for i in of_map], 1) if of_map else cotangents.new_zeros(m, 0, e)
            b = _cat([gradients[i] for i in of_map], 2) if of_map else cotangents.new_zeros(m, k, 0, o)
            factors[name] = JacobianFactors(a.detach(), b.detach())
        return factors

    def _check_calls(self, tracer: LinearCallTracer) -> None:
        """Check that the maps are called in the order of the last trace, and that their weights enter nowhere else.

        Raises:
            UnsupportedError: they are not.
        """
        expected, found = ([call.map.weight for call in calls] for calls in (self._calls, tracer.calls))
        alike = all(self.maps.get(call.map.weight, call.map) == call.map for call in tracer.calls)
        covered = {name for linear in self.maps.values() for name in linear.names}
        if expected != found or not alike or tracer.other_uses & covered:
            raise rows_differ("rows that differ in the layers that they go through, or in how a weight is used")


def _hidden_use(received: str) -> UnsupportedError:
    """The error for a weight that is used where the layers do not show it."""
    return UnsupportedError(
        "a network whose layers show every use of their weights",
        received=received,
        remedy='hessian_structure="full" with inverse="cholesky", "dual" or "cg", or RegVar: they need no layers.',
    )


def _shapes_of(row: PyTree) -> list[torch.Size]:
    """The shapes of the tensors of a row."""
    return [tensor.shape for tensor in tensors_of(row)]


def _cat(tensors: list[Tensor], dim: int) -> Tensor:
    """The tensors joined along `dim`; a single one is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _usable_maps(tracer: LinearCallTracer) -> dict[str, LinearMap]:
    """Maps whose weight and bias enter in one way only.

    Calls with and without a bias, or in two layouts, leave their weight out.
    """
    kinds: dict[str, set[LinearMap]] = {}
    for call in tracer.calls:
        kinds.setdefault(call.map.weight, set()).add(call.map)
    biases = [linear.bias for several in kinds.values() for linear in several if linear.bias is not None]
    single = {name: next(iter(several)) for name, several in kinds.items() if len(several) == 1}
    return {
        name: linear
        for name, linear in single.items()
        if not tracer.other_uses.intersection(linear.names) and biases.count(linear.bias or "") <= 1
    }
