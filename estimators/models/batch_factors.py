"""Factors of the Jacobian at all rows of a batch, by one forward and backward pass on the user's own module.

For a cotangent u per row, the backward pass of ⟨u, f⟩ computes the gradients b by the outputs of all linear maps on its
way to the gradient g of the parameters. This pass is that of a training step: it gives both the factors and what they
are compared with. Rows that are vectorised one at a time need a pass of their own for the comparison.

Two statements are checked at every batch, for random signs c of the rows and random vectors p and q:

    pᵀ (Σ c b aᵀ) q    of each linear map                       against pᵀ g q
    a and b            of a random row alone                    against those among the others

At the first batch, some rows are vectorised instead, as at a query. The first statement is over all rows. Its error is
that of Σ c b aᵀ on average, without that matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from estimators.models.batch_calls import NORMS, BatchCallTracer, BatchLinearCall, BatchNormCall
from estimators.models.disagreement import WHOLE_NORM_SHARE, relative_error
from estimators.models.failures import FAILURES, is_final_error
from estimators.models.jacobian_factors import FACTORS, JacobianFactors, LayerwiseRows
from estimators.models.linear_calls import LinearCall, LinearMap
from estimators.models.network import Network
from estimators.numerics.pytrees import PyTree, n_rows, select_rows
from estimators.runtime.memory import rows_per_chunk

__all__ = ["BatchFactors", "BatchRows"]

_MOST_COTANGENTS = 4
"""Cotangents per row up to which this is used. Each takes a backward pass; vectorised rows share a forward pass."""
_PROBES = 2
"""Pairs of vectors p, q per linear map and batch."""
_ROWS_VECTORISED = 4
"""Rows of the first batch whose factors are also computed as at a query, vectorised over rows."""
_KINKS = 10.0
"""Tolerance of rows alone, in units of that of a gradient: an activation near a kink may round to its other side."""
_MOST_FAILURES = 3
"""Batches that disagree until this is not tried any more."""
_COPIES = 4
"""Tensors of the size of the outputs of all calls that a forward pass keeps."""

Cotangents = Callable[[Tensor], Tensor]
"""Outputs f (B, C) -> K cotangents per row, (B, K, C)."""


@dataclass(frozen=True)
class BatchRows:
    """Jacobian rows at B rows for K cotangents each, as the calls of a forward and the gradients by their outputs.

    Attributes:
        maps: the linear maps, by the name of their weight.
        calls: the calls of these maps.
        gradients: the gradients (B, K, T, O) by the output of each call, times the signs.
        signs: c (B, K), a sign of each row.
        other_rows: plain rows over all other parameters, (B, K, P_other).
    """

    maps: dict[str, LinearMap]
    calls: list[BatchLinearCall]
    gradients: list[Tensor]
    signs: Tensor
    other_rows: Tensor

    @cached_property
    def _sums(self) -> list[Tensor]:
        """The sum of the inputs of each call over the positions of each row, (B, D)."""
        return [call.inputs.summed().to(self.other_rows.dtype) for call in self.calls]

    def chunks(self, size: int, *, pooled: bool) -> Iterator[LayerwiseRows]:
        """Yield the rows, `size` at a time; all at once if `pooled`, since each is small then."""
        total = len(self.other_rows)
        for start in range(0, total, total if pooled else size):
            yield self.at(slice(start, total if pooled else start + size), pooled=pooled)

    def at(self, rows: slice | Tensor, *, pooled: bool) -> LayerwiseRows:
        """Return some of the rows, with one position per map if `pooled`."""
        factors = {name: self._pooled(name, rows) if pooled else self._factors(name, rows) for name in self.maps}
        return LayerwiseRows(factors, self.other_rows[rows])

    def _of_map(self, name: str) -> list[int]:
        """The indices of the calls of a map."""
        return [i for i, call in enumerate(self.calls) if call.map.weight == name]

    def _factors(self, name: str, rows: slice | Tensor) -> JacobianFactors:
        """The factors of a map; calls of one weight are joined along T."""
        b = self.other_rows[rows]
        (m, k, _), (o, e) = b.shape, self.maps[name].shape
        inputs = [self.calls[i].inputs.of_rows(rows) for i in self._of_map(name)]
        a = torch.cat([b.new_zeros(m, 0, self.maps[name].n_inputs), *(part.to(b.dtype) for part in inputs)], 1)
        if self.maps[name].bias is not None:
            a = torch.cat([a, a.new_ones(*a.shape[:2], 1)], 2)
        gradients = [self.gradients[i][rows] for i in self._of_map(name)]
        joined = torch.cat([b.new_zeros(m, k, 0, o), *gradients], 2)
        return JacobianFactors(a.view(m, -1, e), joined * self.signs[rows][:, :, None, None])

    def _pooled(self, name: str, rows: slice | Tensor) -> JacobianFactors:
        """The mean of the inputs and the sum of the gradients of a map over its positions."""
        b = self.other_rows[rows]
        (m, k, _), (o, e) = b.shape, self.maps[name].shape
        gradient, total, positions = b.new_zeros(m, k, o), b.new_zeros(m, self.maps[name].n_inputs), 0
        for i in self._of_map(name):
            gradient = gradient + self.gradients[i][rows].sum(2)
            total = total + self._sums[i][rows]
            positions += self.gradients[i].shape[2]
        mean = total / max(1, positions)
        if self.maps[name].bias is not None:
            mean = torch.cat([mean, mean.new_full((m, 1), float(positions > 0))], 1)
        return JacobianFactors(mean.view(m, 1, e), (gradient * self.signs[rows][:, :, None])[:, :, None])


class BatchFactors:
    """Computes `BatchRows` for a network whose other parameters are scales and shifts of norms.

    Args:
        network: the network.
        maps: its linear maps, by the name of their weight.
        other_params: the names of all other parameters.
    """

    def __init__(self, network: Network, maps: dict[str, LinearMap], other_params: list[str]) -> None:
        self.network, self.maps, self.other_params = network, maps, other_params
        self._sizes = [network.subset.entries[name] for name in other_params]
        self._failures, self._positions_first, self._agreed = 0, False, False

    def chunk_size(self, calls: Sequence[LinearCall], functions: dict[str, set[str]], n_cotangents: int) -> int:
        """Return how many rows one backward pass takes, or 0 if the network or the number of cotangents is unsuited.

        Args:
            calls: the linear calls of one row.
            functions: the functions that use the other parameters, by name.
            n_cotangents: K.
        """
        norms = {function.__name__ for function in NORMS}
        suited = all(functions.get(name, set()) <= norms for name in self.other_params)
        subset = self.network.subset
        if not suited or n_cotangents > _MOST_COTANGENTS or self._failures >= _MOST_FAILURES or subset.complex_names:
            return 0
        if self.network.check.stored is not None or self.network.routes.outputs_by_user_module:
            return 0
        outputs = sum(call.output_shape.numel() for call in calls)
        return rows_per_chunk(self.network.theta.element_size() * (_COPIES + 2 * n_cotangents) * outputs)

    def rows_at(
        self,
        x: PyTree,
        cotangents: Cotangents,
        calls: Sequence[LinearCall],
        vectorised: Callable[[PyTree, Tensor], LayerwiseRows],
        *,
        pooled: bool,
    ) -> BatchRows | None:
        """Return the Jacobian rows at x, compared if they are due; None if a comparison disagrees or a step fails.

        Args:
            x: inputs of B rows.
            cotangents: makes K cotangents per row from the outputs.
            calls: the linear calls of one row.
            vectorised: computes the rows at M rows for cotangents (M, K, C) as at a query.
            pooled: whether rows are needed at one position only.
        """
        check = self.network.check
        is_due = check.is_due(FACTORS, x)
        orders = (self._positions_first,) if self._agreed else (False, True)
        for self._positions_first in orders:
            try:
                found = self._compared(x, cotangents, calls, vectorised if is_due else None, pooled=pooled)
            except FAILURES as failure:
                if is_final_error(failure):
                    raise
                found = None
            if found is not None:
                self._agreed = True
                return found
        self._failures += 1
        return None

    def _compared(
        self,
        x: PyTree,
        cotangents: Cotangents,
        calls: Sequence[LinearCall],
        vectorised: Callable[[PyTree, Tensor], LayerwiseRows] | None,
        *,
        pooled: bool,
    ) -> BatchRows | None:
        """The Jacobian rows at x; None if they do not agree with the gradient or with those of rows alone.

        Without `vectorised`, nothing is compared.
        """
        check = self.network.check
        found = self._computed(x, cotangents, calls, with_gradient=vectorised is not None)
        if found is None:
            return None
        rows, u, error = found
        if vectorised is None:
            return rows
        some = check.random_order(len(u)).to(u.device)
        some = some[:1] if self._agreed else some[:_ROWS_VECTORISED]
        x_some, u_some = select_rows(x, some), u[some]
        with check.counted():
            if not self._agreed:
                alone = vectorised(x_some, u_some)
                alone = alone.pooled() if pooled else alone
            else:
                of_one = self._computed(x_some, lambda _: u_some, calls, with_gradient=False)
                if of_one is None:
                    return None
                alone = of_one[0].at(slice(None), pooled=pooled)
        error = _largest([error, _error_of_rows(rows.at(some, pooled=pooled), alone) / _KINKS])
        if not error <= check.tolerance():
            return None
        check.report.record_agreement(FACTORS, n_rows(x), error)
        check.report.routes[FACTORS] = "one backward pass on the module"
        return rows

    def _computed(
        self, x: PyTree, cotangents: Cotangents, calls: Sequence[LinearCall], *, with_gradient: bool
    ) -> tuple[BatchRows, Tensor, float] | None:
        """The rows, the cotangents u (B, K, C), and the error of Σ c b aᵀ (0 without a gradient)."""
        check, subset, dtype = self.network.check, self.network.subset, self.network.theta.dtype
        params = dict(zip(subset.shapes, check.reference.parameters, strict=True))
        tracer, n = BatchCallTracer(params), n_rows(x)
        with check.reference.traced_outputs(x, tracer) as f:
            linear = tracer.linear_calls(n, calls, positions_first=self._positions_first)
            norms = tracer.norm_calls(n, positions_first=self._positions_first)
            if linear is None or norms is None or tracer.other_uses or not f.requires_grad:
                return None
            linear = [call for call in linear if call.map.weight in self.maps]
            u = cotangents(f.detach().to(dtype))
            signs = check.random(u[..., 0]).sign()
            chosen = params if with_gradient else {}
            edges = [*(call.edge for call in linear), *(call.edge for call in norms)]
            of_calls: list[list[Tensor]] = []
            others: list[Tensor] = []
            error = 0.0
            for k in range(u.shape[1]):
                signed = (signs[:, k, None] * u[:, k]).to(f.dtype)
                check.reference.pass_counter.backward(n)
                g, b = _pulled(f, signed, chosen, edges, keep_graph=k + 1 < u.shape[1])
                with torch.no_grad():
                    found = [_gradient(call, b[i], n) for i, call in enumerate(linear)]
                    rows = self._other_rows(norms, b[len(linear) :], f)
                    if with_gradient:
                        error = max(error, self._error(linear, found, rows, g, any_u=bool(u[:, k].any())))
                    of_calls.append([part.to(dtype) for part in found])
                    others.append((signs[:, k, None] * rows).to(dtype))
        gradients = [_stacked(parts) for parts in zip(*of_calls, strict=True)]
        return BatchRows(self.maps, linear, gradients, signs, _stacked(others)), u, error

    def _other_rows(self, norms: list[BatchNormCall], gradients: list[Tensor | None], f: Tensor) -> Tensor:
        """Rows (B, P_other) over the other parameters."""
        found = {name: f.new_zeros(len(f), size) for name, size in zip(self.other_params, self._sizes, strict=True)}
        for call, gradient in zip(norms, gradients, strict=True):
            for name, rows in ({} if gradient is None else call.rows(gradient)).items():
                found[name] = found[name] + rows
        return torch.cat([f.new_zeros(len(f), 0), *found.values()], 1)

    def _error(
        self,
        calls: list[BatchLinearCall],
        gradients: list[Tensor],
        other_rows: Tensor,
        g: dict[str, Tensor | None],
        *,
        any_u: bool,
    ) -> float:
        """The largest error of a parameter's gradient from the factors against g, relative to its norm."""
        errors: dict[str, tuple[float, float]] = {}
        for name, summed in zip(self.other_params, other_rows.sum(0).split(self._sizes), strict=True):
            expected = torch.zeros_like(summed) if g[name] is None else g[name].flatten()  # type: ignore[union-attr]
            errors[name] = float((summed - expected).norm()), float(expected.norm())
        for name, linear in self.maps.items():
            of_map = [i for i, call in enumerate(calls) if call.map.weight == name]
            pairs = [(calls[i], gradients[i]) for i in of_map]
            errors[name] = self._error_of_map(linear, pairs, g)
        self.network.check.note_gradient(expected=any_u, seen=any(scale > 0 for _, scale in errors.values()))
        return _largest_relative(list(errors.values()))

    def _error_of_map(
        self, linear: LinearMap, calls: list[tuple[BatchLinearCall, Tensor]], g: dict[str, Tensor | None]
    ) -> tuple[float, float]:
        """The error of Σ c b aᵀ of a map along random p and q, and the norm of its gradient; both root mean squares."""
        expected = [_as_matrix(linear, g[linear.weight])]
        if linear.bias is not None:
            bias = g[linear.bias]
            expected.append(None if bias is None else bias[:, None])
        known = [part for part in expected if part is not None]
        like = known[0] if known else self.network.theta
        random = self.network.check.random
        p, q = (random(like.new_empty(_PROBES, size)).sign() for size in linear.shape)
        weights, constants = q[:, : linear.n_inputs], q[:, linear.n_inputs :]
        found = like.new_zeros(_PROBES)
        for call, gradient in calls:
            along = gradient @ p.T.to(gradient)  # bᵀp (B, T, n)
            found = found + (along * call.inputs.products(weights.to(gradient))).sum((0, 1))
            if linear.bias is not None:
                found = found + along.sum((0, 1)) * constants[:, 0]
        squares = 0.0
        for part, of_part in zip(expected, (weights, constants), strict=False):
            if part is not None:
                along_p = p @ part  # pᵀg, whose mean square is that of g
                found, squares = found - (along_p * of_part).sum(1), squares + float(along_p.square().sum())
        return float(found.norm()) / math.sqrt(_PROBES), math.sqrt(squares / _PROBES)


def _pulled(
    f: Tensor, u: Tensor, params: dict[str, Tensor], edges: Sequence[object], *, keep_graph: bool
) -> tuple[dict[str, Tensor | None], list[Tensor | None]]:
    """The gradients of ⟨u, f⟩ by the parameters, by name, and at the edges."""
    reached = [edge for edge in edges if edge is not None]
    wanted = [*params.values(), *reached]
    if not wanted:
        return {}, [None] * len(edges)
    found = list(torch.autograd.grad(f, wanted, u, retain_graph=keep_graph, allow_unused=True))  # type: ignore[arg-type]
    of_edges = iter(found[len(params) :])
    return dict(zip(params, found, strict=False)), [None if edge is None else next(of_edges) for edge in edges]


def _gradient(call: BatchLinearCall, gradient: Tensor | None, rows: int) -> Tensor:
    """The gradient by the output of a call, (B, T, O); 0 if none reaches it."""
    if gradient is not None:
        return call.by_position(gradient)
    positions = call.inputs.of_rows(slice(None))
    return positions.new_zeros(rows, positions.shape[1], call.map.n_outputs)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Tensors (B, ...) of K cotangents as (B, K, ...); a single one is not copied."""
    return parts[0][:, None] if len(parts) == 1 else torch.stack(list(parts), 1)


def _as_matrix(linear: LinearMap, gradient: Tensor | None) -> Tensor | None:
    """The gradient of the weight of a map as (O, D)."""
    if gradient is None:
        return None
    return (gradient.transpose(0, 1) if linear.transposed else gradient).flatten(1)


def _error_of_rows(found: LayerwiseRows, expected: LayerwiseRows) -> float:
    """The largest error of the inputs or gradients of a map, or of the other rows; infinite if shapes differ."""
    pairs = [(factors, expected.factors[name]) for name, factors in found.factors.items()]
    inputs = [(one.inputs, other.inputs) for one, other in pairs]
    gradients = [(one.gradients, other.gradients) for one, other in pairs]
    gradients.append((found.other_rows, expected.other_rows))
    if any(one.shape != other.shape for one, other in (*inputs, *gradients)):
        return math.inf
    return _largest([_largest_error(inputs), _largest_error(gradients)])


def _largest_error(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """The largest error of a tensor against another, relative to its norm and to a share of the norm of all."""
    return _largest_relative([(float((one - other).norm()), float(other.norm())) for one, other in pairs])


def _largest_relative(errors: list[tuple[float, float]]) -> float:
    """The largest of pairs (error, norm of what was expected) as a relative error."""
    whole = math.hypot(*(scale for _, scale in errors))
    return _largest([relative_error(error, scale + WHOLE_NORM_SHARE * whole) for error, scale in errors])


def _largest(errors: list[float]) -> float:
    """The largest error; NaN if one is."""
    return max(errors, key=lambda value: math.inf if math.isnan(value) else value, default=0.0)
