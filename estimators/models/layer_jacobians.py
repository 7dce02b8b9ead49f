"""Per-row Jacobians in factors, layer by layer.

A linear map with inputs a and slopes b by its output has J = Σ_t b_t a_tᵀ, which need not be made. Sharing over t
(tokens, pixels, repeated calls) is a longer sum. Rows are taken one at a time inside `vmap`, so that it does not matter
where a layer keeps its batch dimension. Parameters that enter otherwise (norms, embeddings, raw tensors) are the rest,
with plain Jacobian rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jacrev, vjp, vmap

from estimators.errors import EstimatorError, UnsupportedError
from estimators.models.layer_layout import Layout
from estimators.models.linear_calls import LinearCall, LinearCallTracer, LinearMap
from estimators.models.network import FAILURES, Network, differentiable
from estimators.models.subsets import complex_of
from estimators.numerics.pytrees import PyTree, n_rows, row_as_batch, select_rows, split_rows, tensors_of
from estimators.numerics.vectorize import over_rows
from estimators.runtime.memory import rows_per_chunk

__all__ = ["JacobianFactors", "LayerwiseJacobian", "LayerwiseRows"]

FACTORS = "factors of layers"

_NO_PRODUCTS = {
    *("embedding", "embedding_bag", "add", "__add__", "__radd__", "__iadd__", "add_", "layer_norm", "group_norm"),
    *("__getitem__", "expand", "expand_as", "unsqueeze"),
}
"""Names of functions that take a weight otherwise than as a factor of a product with the activations."""
Cotangents = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class JacobianFactors:
    """Of one linear map at M rows: inputs a (M, T, E), a 1 appended for a bias; slopes b (M, K, T, O)."""

    inputs: Tensor
    slopes: Tensor

    def to(self, dtype: torch.dtype) -> JacobianFactors:
        """Returns the factors in a dtype."""
        return JacobianFactors(self.inputs.to(dtype), self.slopes.to(dtype))

    def at_one_place(self) -> JacobianFactors:
        """Itself, where T = 1. Errors: UnsupportedError."""
        if self.inputs.shape[1] != 1:
            raise _not_alike(f"rows that apply one to {self.inputs.shape[1]} places")
        return self

    def jacobians(self) -> Tensor:
        """Σ_t b_t a_tᵀ, (M, K, O, E)."""
        _, k, _, o = self.slopes.shape
        left = self.slopes.transpose(2, 3).flatten(1, 2)  # (M, K·O, T): one product a row
        jacobians: Tensor = (left @ self.inputs).unflatten(1, (k, o))
        return jacobians


@dataclass(frozen=True)
class LayerwiseRows:
    """At M rows, for K cotangents each: factors by linear map, and the rest's rows (M, K, P_rest)."""

    factors: dict[str, JacobianFactors]
    rest: Tensor


class LayerwiseJacobian:
    """The linear maps of a network by the name of their weight, and the names of the rest; found by one forward.

    With `maps` they are those of a fit, of which a query may use some only. Errors: UnsupportedError where it uses
    their weights in other ways.
    """

    def __init__(self, network: Network, x: PyTree, maps: dict[str, LinearMap] | None = None) -> None:
        self.network = network
        self._pieces = {name: piece.clone() for name, piece in network.params.items()}
        seen = self._look(select_rows(x, slice(0, 1)))
        self.maps = _usable(seen) if maps is None else maps
        self._refuse_other_uses(seen)
        covered = {name for linear in self.maps.values() for name in linear.names}
        self.rest = [name for name in self._pieces if name not in covered]

    def _look(self, row: PyTree) -> LinearCallTracer:
        """What one row's forward shows: the uses, and the number of outputs."""
        try:
            f, seen = self._forward(row)
        except EstimatorError:
            raise
        except FAILURES:  # inside a function mode; the network itself has given outputs before
            f, seen = self.network.outputs(row), LinearCallTracer(self._pieces)
        self.n_outputs, self._uses, self._looked_at = f.shape[-1], seen.uses, _shapes_of(row)
        self._functions = seen.functions
        return seen

    @property
    def other_products(self) -> list[str]:
        """Names in the rest of weights that may be factors of products, in no way or in several that are known.

        What only embeds or shifts, and what has one dimension (scales of norms), is left out.
        """
        linear = {use.map.weight for use in self._uses}

        def is_factor(name: str) -> bool:
            matrix = sum(size > 1 for size in self._pieces[name].shape) > 1
            return matrix and (name in linear or not self._functions.get(name, {""}) <= _NO_PRODUCTS)

        return [name for name in self.rest if is_factor(name)]

    @property
    def no_weight_sharing(self) -> bool:
        """Whether most parameters are in maps, and on the last row looked at each map was applied to one place."""
        uses = [use for use in self._uses if use.map.weight in self.maps]
        at_one_place = all(len(use.inputs) == 1 for use in uses)
        in_maps = sum(o * e for o, e in (linear.shape for linear in self.maps.values()))
        once = at_one_place and sorted(use.map.weight for use in uses) == sorted(self.maps)
        return once and 2 * in_maps >= self.network.n_parameters

    def bytes_a_row(self) -> dict[str, int]:
        """Of the factors of one row along as many cotangents as outputs, by map, as the last row looked at had them."""
        element = self.network.theta.element_size()
        found = dict.fromkeys(self.maps, 0)
        for use in self._uses:
            if use.map.weight in found:
                slopes = self.n_outputs * use.output_shape.numel()
                found[use.map.weight] += element * (use.rows().numel() + slopes)
        return found

    def at(self, x: PyTree, cotangents: Cotangents | None = None, y: Tensor | None = None) -> Iterator[LayerwiseRows]:
        """Rows of x a piece at a time; `cotangents(f, y)` (M, K, C), or each output by itself."""
        row = select_rows(x, slice(0, 1))
        if _shapes_of(row) != self._looked_at:
            self._refuse_other_uses(self._look(row))
        eye = torch.eye(self.n_outputs, dtype=self.network.theta.dtype, device=self.network.theta.device)
        for piece, targets in split_rows((x, y), self._rows_at_once):
            if cotangents is None:
                yield self._rows(piece, eye.expand(n_rows(piece), -1, -1))
            else:
                yield self._rows(piece, cotangents(self.network.outputs(piece), targets))

    @property
    def _rows_at_once(self) -> int:
        inputs = sum(use.inputs.numel() for use in self._uses)
        slopes = sum(use.output_shape.numel() for use in self._uses)
        rest = sum(self._pieces[name].numel() for name in self.rest)
        return rows_per_chunk(self.network.theta.element_size() * (2 * inputs + 3 * self.n_outputs * (slopes + rest)))

    def _rows(self, x: PyTree, cotangents: Tensor) -> LayerwiseRows:
        rows, k = cotangents.shape[:2]
        with differentiable(), self.network.pass_counter.transformed(forward=rows, backward=rows * k) as counted:
            try:
                inputs, slopes, rest = over_rows(counted(self._one), x, cotangents)
            except EstimatorError:
                raise
            except FAILURES as error:
                raise _unseen(f"layers that cannot be differentiated in a vectorised call ({error})") from error
        found = LayerwiseRows(self._joined(inputs, slopes, cotangents), rest.detach())
        self._check(x, cotangents, found)
        return found

    def _check(self, x: PyTree, cotangents: Tensor, rows: LayerwiseRows) -> None:
        """Compare Σ c b aᵀ of random c (M, K) with Jᵀ(Σ c u) by plain autograd on the user's module.

        Raises:
            UnsupportedError: a weight is used where the layers do not show it.
        """
        check = self.network.check
        if not check.due(FACTORS, x, cotangents.shape[1]):
            return
        c = check.random(cotangents[..., 0])
        apart = self.network.slope_error(x, torch.einsum("mk,mkc->mc", c, cotangents), self._contracted(rows, c))
        if apart.within(check.tolerance()):
            check.seen(FACTORS, n_rows(x), apart.error)
            return
        check.report.disagreements.append(f"{FACTORS}: {apart}; the forms without factors are used where they exist")
        raise _unseen(f"factors of layers whose slope {apart}")

    def _contracted(self, rows: LayerwiseRows, c: Tensor) -> Tensor:
        """Σ_mk c J, (P,)."""
        layout, total = Layout(self.network.subset, self.maps, self.rest), torch.zeros_like(self.network.theta)
        for name, factors in rows.factors.items():
            weighted = factors.slopes * c[:, :, None, None].to(factors.slopes)
            layout.put(total, name, torch.einsum("mkto,mte->oe", weighted, factors.inputs).to(total))
        if self.rest:
            total[layout.rest_index.to(total.device)] = torch.einsum("mk,mkp->p", c.to(rows.rest), rows.rest).to(total)
        return total

    def _one(self, row: PyTree, cotangents: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Of one row: inputs (T, E) and slopes (K, T, O) of every use, rest (K, P_rest)."""
        uses: list[LinearCall] = []

        def forward(offsets: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            f, seen = self._forward(row_as_batch(row), offsets)
            uses[:] = seen.uses
            self._refuse_other_uses(seen)
            return f[0], [use.rows() for use in seen.uses]

        offsets = [cotangents.new_zeros(use.output_shape) for use in self._uses]
        _, pull, inputs = vjp(forward, offsets, has_aux=True)  # type: ignore[misc]
        pulled = vmap(pull)(cotangents)[0]
        return inputs, [use.slopes(b) for use, b in zip(uses, pulled, strict=True)], self._rest_of(row, cotangents)

    def _rest_of(self, row: PyTree, cotangents: Tensor) -> Tensor:
        if not self.rest:
            return cotangents.new_zeros(len(cotangents), 0)

        complex_names = self.network.subset.complex_names

        def outputs(rest: dict[str, Tensor]) -> Tensor:
            params = {name: complex_of(piece) if name in complex_names else piece for name, piece in rest.items()}
            f: Tensor = self.network.functional_outputs({**self._pieces, **params}, row_as_batch(row))[0]
            return cotangents @ f

        params = {name: self._pieces[name] for name in self.rest}
        slopes = jacrev(outputs)({n: torch.view_as_real(p) if p.is_complex() else p for n, p in params.items()})
        return torch.cat([slopes[name].reshape(len(cotangents), -1) for name in self.rest], dim=1)

    def _forward(self, x: PyTree, offsets: list[Tensor] | None = None) -> tuple[Tensor, LinearCallTracer]:
        with differentiable(), LinearCallTracer(self._pieces, offsets) as recorder:
            return self.network.functional_outputs(self._pieces, x), recorder

    def _joined(self, inputs: list[Tensor], slopes: list[Tensor], cotangents: Tensor) -> dict[str, JacobianFactors]:
        """Uses of one weight joined along T: its Jacobian is their sum, over none where these rows do without it."""
        factors, (m, k, _) = {}, cotangents.shape
        for name, linear in self.maps.items():
            places = [i for i, use in enumerate(self._uses) if use.map.weight == name]
            o, e = linear.shape
            a = _cat([inputs[i] for i in places], 1) if places else cotangents.new_zeros(m, 0, e)
            b = _cat([slopes[i] for i in places], 2) if places else cotangents.new_zeros(m, k, 0, o)
            factors[name] = JacobianFactors(a.detach(), b.detach())
        return factors

    def _refuse_other_uses(self, seen: LinearCallTracer) -> None:
        """UnsupportedError where the maps are not used in the order looked at last, or their weights in other ways."""
        order, found = ([use.map.weight for use in uses] for uses in (self._uses, seen.uses))
        alike = all(self.maps.get(use.map.weight, use.map) == use.map for use in seen.uses)
        covered = {name for linear in self.maps.values() for name in linear.names}
        if order != found or not alike or seen.elsewhere & covered:
            raise _not_alike("rows that differ in the layers that they go through, or in how a weight is used")


def _not_alike(received: str) -> UnsupportedError:
    return UnsupportedError(
        "a network that uses its linear layers alike at every row",
        received=received,
        remedy='hessian_structure="full" with inverse="cholesky" or "cg", or RegVar.',
    )


def _unseen(received: str) -> UnsupportedError:
    return UnsupportedError(
        "a network whose layers show every use of their weights",
        received=received,
        remedy='hessian_structure="full" with inverse="cholesky", "dual" or "cg", or RegVar: they need no layers.',
    )


def _shapes_of(row: PyTree) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors_of(row)]


def _cat(tensors: list[Tensor], dim: int) -> Tensor:
    """Joined; one by itself is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _usable(seen: LinearCallTracer) -> dict[str, LinearMap]:
    """Maps whose weight and bias enter in one way only; of calls with and without a bias, or in two layouts, none."""
    maps: dict[str, set[LinearMap]] = {}
    for use in seen.uses:
        maps.setdefault(use.map.weight, set()).add(use.map)
    biases = [linear.bias for kinds in maps.values() for linear in kinds if linear.bias is not None]
    return {
        name: next(iter(kinds))
        for name, kinds in maps.items()
        if len(kinds) == 1
        and not seen.elsewhere.intersection(next(iter(kinds)).names)
        and biases.count(next(iter(kinds)).bias or "") <= 1
    }
