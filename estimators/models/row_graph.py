"""A function of one row as a graph of torch operations, and the same graph for any number of rows.

Derivatives per row need `vmap`, whose rules for some operations (convolutions, pooling) fix the number of rows, so that
`torch.export` cannot leave it free. Therefore the function is first recorded for one row, as operations without
transforms. Then each recorded operation is applied to all rows: by `vmap`, or by a rule here that joins the rows with
the batch dimension that the operation already has. `rows_in_turn` needs no such rules, and the memory of one row; it is
slow for small networks.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import get_decompositions
from torch._export.utils import _compiling_state_context
from torch._higher_order_ops.map import map as map_rows
from torch.func import functionalize, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from estimators.errors import ModelError
from estimators.models.failures import FAILURES, short

__all__ = ["graph_of_row", "graph_of_rows", "rows_in_turn"]

aten = torch.ops.aten
PyTensors = Any
"""A pytree of tensors."""

_NORMS = (
    aten.native_batch_norm,
    aten.native_batch_norm_backward,
    aten._native_batch_norm_legit,
    aten._native_batch_norm_legit_no_training,
    aten._native_batch_norm_legit_functional,
    aten.native_group_norm,
    aten.native_group_norm_backward,
    aten.native_layer_norm,
    aten.native_layer_norm_backward,
)
"""Operations that are recorded as elementwise ones: their rules for `vmap` fix the number of rows."""

_WITH_BATCH = (
    *(aten.convolution.default, aten.max_pool2d_with_indices.default, aten.max_pool2d_with_indices_backward.default),
    *(aten.max_pool3d_with_indices.default, aten.max_pool3d_with_indices_backward.default),
    *(aten.im2col.default, aten.col2im.default),
    *(aten.avg_pool2d.default, aten.avg_pool2d_backward.default),
    *(aten.avg_pool3d.default, aten.avg_pool3d_backward.default),
    *(aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d_backward.default),
    *(aten._adaptive_avg_pool3d.default, aten._adaptive_avg_pool3d_backward.default),
)
"""Operations with a batch dimension first in their tensors with rows, and which treat its entries independently."""

_DIMENSIONS = {
    aten.cat.default: {1: 0},
    aten.gather.default: {1: 0},
    aten.diagonal_scatter.default: {3: 0, 4: 1},
    aten.select_scatter.default: {2: 0},
    aten.slice_scatter.default: {2: 0},
}
"""Operations that are the same with rows first, by the positions and defaults of dimensions among their arguments."""


_OF_SHAPES = (
    *(aten.new_zeros.default, aten.new_ones.default, aten.new_empty.default, aten.new_full.default),
    *(aten.zeros_like.default, aten.ones_like.default, aten.empty_like.default, aten.full_like.default),
    aten._new_zeros_with_same_feature_meta.default,
)
"""Operations whose results depend on shapes alone, and are therefore the same for all rows."""


def graph_of_row(function: Callable[..., PyTensors], tensors: Sequence[Tensor]) -> fx.GraphModule:
    """Record the operations of a function at tensors without their dimension of rows.

    Args:
        function: tensors -> tensors, a function of one row; data-dependent control flow raises.
        tensors: the arguments of one row.

    Returns:
        A graph without mutations, transforms and unused operations.
    """
    options: dict[str, Any] = {"tracing_mode": "fake", "_allow_non_fake_inputs": True}
    table: Any = get_decompositions(_NORMS)
    with torch.no_grad(), _compiling_state_context():  # forwards that ask whether they are exported leave out branches
        recorded = make_fx(function, decomposition_table=table, **options)(*tensors)
        names = list(dict.fromkeys(node.target for node in recorded.graph.nodes if node.op == "get_attr"))
        constants = [getattr(recorded, name).detach() for name in names]

        def of_all(*arguments: Tensor) -> PyTensors:
            given = dict(zip(names, arguments[len(tensors) :], strict=True))
            return _ConstantsInterpreter(recorded, given).run(*arguments[: len(tensors)])

        # Constants are arguments here: an operation in place may change a tensor that was made from one.
        without_mutations = functionalize(of_all, remove="mutations")
        graph: fx.GraphModule = make_fx(without_mutations, **options)(*tensors, *constants)
    _bind_last_arguments(graph, constants)
    graph.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    graph.recompile()
    return graph


class _ConstantsInterpreter(fx.Interpreter):
    """Runs a graph with other tensors in place of its constants."""

    def __init__(self, graph: fx.GraphModule, constants: Mapping[str, Tensor]) -> None:
        super().__init__(graph)
        self.constants = constants

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401, ARG002
        return self.constants[target]


def _bind_last_arguments(graph: fx.GraphModule, constants: Sequence[Tensor]) -> None:
    """Make the last arguments of a graph constants again."""
    arguments = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for i, (node, constant) in enumerate(zip(arguments[len(arguments) - len(constants) :], constants, strict=True)):
        graph.register_buffer(f"_constant_{i}", constant)
        with graph.graph.inserting_after(arguments[-1]):
            node.replace_all_uses_with(graph.graph.get_attr(f"_constant_{i}"))
        graph.graph.erase_node(node)


def graph_of_rows(graph: fx.GraphModule, tensors: Sequence[Tensor], has_rows: Sequence[bool]) -> fx.GraphModule:
    """Record a graph of one row for any number of rows.

    Args:
        graph: what `graph_of_row` returned.
        tensors: the arguments with rows first, at least two; shared arguments as in `graph_of_row`.
        has_rows: whether an argument has rows.

    Returns:
        A graph whose results have rows first.

    Raises:
        ModelError: an operation cannot be applied to any number of rows.
    """

    def all_rows(*arguments: Tensor) -> Any:  # noqa: ANN401
        marked = [_Rows(t) if own else t for t, own in zip(arguments, has_rows, strict=True)]
        first = next(t for t, own in zip(arguments, has_rows, strict=True) if own)
        found = _RowsInterpreter(graph, first.shape[0]).run(*marked)
        return pytree.tree_map_only((_Rows, Tensor), lambda t: _with_rows(t, first.shape[0]), found)

    recorder = make_fx(all_rows, tracing_mode="symbolic", _allow_non_fake_inputs=True)
    with torch.no_grad():
        recorded: fx.GraphModule = recorder(*tensors)
    return recorded


def rows_in_turn(graph: fx.GraphModule, has_rows: Sequence[bool]) -> Callable[..., PyTensors]:
    """Return the function that applies a graph of one row to one row after the other, in the memory of one.

    Args:
        graph: what `graph_of_row` returned.
        has_rows: whether an argument has rows.

    Returns:
        A function whose arguments and results have rows first, and that `torch.export` can record.
    """

    def all_rows(*arguments: Tensor) -> PyTensors:
        pairs = list(zip(arguments, has_rows, strict=True))
        shared = [t for t, own in pairs if not own]

        def one_row(rows: tuple[Tensor, ...], *shared: Tensor) -> PyTensors:
            own_rows, others = iter(rows), iter(shared)
            return graph(*(next(own_rows) if own else next(others) for own in has_rows))

        mapped: Any = map_rows  # its types do not allow further arguments
        return mapped(one_row, tuple(t for t, own in pairs if own), *shared)

    return all_rows


@dataclass(frozen=True)
class _Rows:
    """A value that differs between rows: a tensor with rows first."""

    tensor: Tensor


class _RowsInterpreter(fx.Interpreter):
    """Runs a graph of one row on `_Rows` in place of its arguments; the number of rows is a `torch.SymInt`."""

    def __init__(self, graph: fx.GraphModule, n_rows: Any) -> None:  # noqa: ANN401
        super().__init__(graph)
        self.n_rows = n_rows

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        leaves = pytree.tree_leaves((args, kwargs), is_leaf=_is_rows)
        if target is operator.getitem or not any(map(_is_rows, leaves)):
            return target(*args, **kwargs)
        found = self._rule(target)(*args, **kwargs)
        if self.n_rows.node.maybe_as_int() is not None:
            raise _fixed_rows(target)
        return found

    def _rule(self, target: Any) -> Callable[..., Any]:  # noqa: ANN401
        """Return the function that applies an operation to all rows."""
        rules: dict[Any, Callable[..., Any]] = {
            aten.convolution_backward.default: self._convolution_backward,
            aten.embedding_dense_backward.default: self._embedding_backward,
            aten.copy.default: self._copy,
            aten.view.default: self._view,
            aten._unsafe_view.default: self._view,
            aten.mm.default: self._product,
            aten.bmm.default: self._product,
        }
        if target in rules:
            return rules[target]
        if target in _OF_SHAPES:
            return partial(_same_for_all_rows, target)
        if target in _WITH_BATCH:
            return partial(self._joined, target)
        if target in _DIMENSIONS:
            return partial(self._shifted, target)
        return partial(_pointwise if torch.Tag.pointwise in target.tags else _mapped, target)

    def _copy(self, tensor: _Rows | Tensor, source: _Rows | Tensor, **options: Any) -> Any:  # noqa: ANN401
        """Apply `copy`, whose result has the shape of its first argument."""
        return _pointwise(aten.copy.default, _Rows(_with_rows(tensor, self.n_rows)), source, **options)

    def _joined(self, target: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Apply an operation to rows joined with its batch dimension."""
        if any(isinstance(a, _Rows) for a in args[1:3]) and target is aten.convolution.default:
            raise _fixed_rows("a convolution whose weights differ between rows")
        batch = next(a.tensor.shape[1] for a in args if isinstance(a, _Rows))
        n_tensors = 1 if target is aten.convolution.default else len(args)  # weights follow
        joined = [
            _with_rows(a, self.n_rows).flatten(0, 1) if i < n_tensors and isinstance(a, (_Rows, Tensor)) else a
            for i, a in enumerate(args)
        ]
        found = target(*joined, **kwargs)
        return pytree.tree_map_only(Tensor, lambda t: _Rows(t.unflatten(0, (self.n_rows, batch))), found)

    def _shifted(self, target: Any, *args: Any, **kwargs: Any) -> _Rows:  # noqa: ANN401
        """Apply an operation to tensors with rows first, with every dimension one further."""
        given = [
            pytree.tree_map_only((_Rows, Tensor), lambda t: _with_rows(t, self.n_rows), a, is_leaf=_is_rows)
            for a in args
        ]
        for i, default in _DIMENSIONS[target].items():
            given += [0] * (i + 1 - len(given))
            dimension = args[i] if i < len(args) else default
            given[i] = dimension + 1 if dimension >= 0 else dimension
        return _Rows(target(*given, **kwargs))

    def _view(self, rows: _Rows, shape: Sequence[int]) -> _Rows:
        """A view, or a copy if rows first have strides that do not allow one."""
        return _Rows(rows.tensor.reshape(self.n_rows, *shape))

    def _product(self, left: _Rows | Tensor, right: _Rows | Tensor) -> _Rows:
        """A product of matrices (..., m, k) and (..., k, n), of which one may be the same for all rows.

        `vmap` would copy that one for every row, such as the weights of all posterior draws.
        """
        if not isinstance(right, _Rows):  # rows are further rows of the matrix
            a = _with_rows(left, self.n_rows).movedim(0, -3)
            return _Rows((a.flatten(-3, -2) @ right).unflatten(-2, (self.n_rows, a.shape[-2])).movedim(-3, 0))
        if not isinstance(left, _Rows):  # rows are further columns
            b = right.tensor.movedim(0, -2)
            return _Rows((left @ b.flatten(-2, -1)).unflatten(-1, (self.n_rows, b.shape[-1])).movedim(-2, 0))
        return _Rows(left.tensor @ right.tensor)

    def _embedding_backward(
        self,
        gradient: _Rows | Tensor,
        indices: _Rows | Tensor,
        n_embeddings: int,
        padding: int,
        scale_by_frequency: bool,
    ) -> _Rows:
        """The gradient by the embeddings of each row."""
        if scale_by_frequency:
            raise _fixed_rows("an embedding with scale_grad_by_freq=True")
        b, index = _with_rows(gradient, self.n_rows), _with_rows(indices, self.n_rows)
        b = torch.where((index == padding)[..., None], 0.0, b)
        b, index = b.flatten(1, -2), index.flatten(1)[..., None].expand(-1, -1, b.shape[-1])
        return _Rows(b.new_zeros(self.n_rows, n_embeddings, b.shape[-1]).scatter_add(1, index, b))

    def _convolution_backward(
        self,
        gradient: _Rows | Tensor,
        inputs: _Rows | Tensor,
        weight: _Rows | Tensor,
        bias_sizes: list[int] | None,  # noqa: ARG002
        *options: Any,  # noqa: ANN401
    ) -> tuple[Any, Any, Any]:
        """The gradients by inputs, weight and bias: rows are joined with the batch, or with the groups."""
        *geometry, groups, mask = options
        if isinstance(weight, _Rows) and mask[0]:
            raise _fixed_rows("a convolution whose weights differ between rows")
        b, w = _with_rows(gradient, self.n_rows), _with_rows(weight, self.n_rows)
        a = _with_rows(inputs, self.n_rows)
        by_input = by_weight = by_bias = None
        if mask[0]:
            found = aten.convolution_backward.default(
                b.flatten(0, 1), a.flatten(0, 1), weight, None, *geometry, groups, [True, False, False]
            )[0]
            by_input = _Rows(found.unflatten(0, (self.n_rows, a.shape[1])))
        if mask[1]:
            found = aten.convolution_backward.default(
                b.transpose(0, 1).flatten(1, 2),
                a.transpose(0, 1).flatten(1, 2),
                w.flatten(0, 1),
                None,
                *geometry,
                self.n_rows * groups,
                [False, True, False],
            )[1]
            by_weight = _Rows(found.unflatten(0, (self.n_rows, w.shape[1])))
        if mask[2]:
            by_bias = _Rows(b.sum((1, *range(3, b.ndim))))
        return by_input, by_weight, by_bias


def _is_rows(leaf: object) -> bool:
    return isinstance(leaf, _Rows)


def _same_for_all_rows(target: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    """Apply an operation to tensors of the shapes of one row."""

    def of_row(leaf: Any) -> Any:  # noqa: ANN401
        return leaf.tensor.new_empty(leaf.tensor.shape[1:]) if isinstance(leaf, _Rows) else leaf

    arguments, keywords = pytree.tree_map(of_row, (args, kwargs), is_leaf=_is_rows)
    return target(*arguments, **keywords)


def _pointwise(target: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    """Apply an elementwise operation to tensors with rows first, whose other dimensions are aligned from the right."""
    leaves = pytree.tree_leaves((args, kwargs), is_leaf=_is_rows)
    of_rows = [leaf.tensor.ndim - 1 for leaf in leaves if isinstance(leaf, _Rows)]
    rank = max([*of_rows, *(leaf.ndim for leaf in leaves if isinstance(leaf, Tensor))])

    def aligned(leaf: Any) -> Any:  # noqa: ANN401
        if not isinstance(leaf, _Rows):
            return leaf
        rows = leaf.tensor
        return rows[(slice(None), *(None,) * (rank + 1 - rows.ndim), ...)]

    arguments, keywords = pytree.tree_map(aligned, (args, kwargs), is_leaf=_is_rows)
    return pytree.tree_map_only(Tensor, _Rows, target(*arguments, **keywords))


def _mapped(target: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    """Apply an operation to each row by `vmap`."""
    leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=_is_rows)
    which = [i for i, leaf in enumerate(leaves) if _is_rows(leaf)]

    def call(*rows: Tensor) -> Any:  # noqa: ANN401
        filled = list(leaves)
        for i, row in zip(which, rows, strict=True):
            filled[i] = row
        arguments, keywords = pytree.tree_unflatten(filled, spec)
        return target(*arguments, **keywords)

    try:
        found = vmap(call)(*(leaves[i].tensor for i in which))
    except FAILURES as error:
        raise _fixed_rows(f"{target}, of which torch says: {short(error)}") from error
    return pytree.tree_map_only(Tensor, _Rows, found)


def _with_rows(value: _Rows | Tensor, n_rows: Any) -> Tensor:  # noqa: ANN401
    """Return the tensor with rows first; a value without rows is expanded."""
    return value.tensor if isinstance(value, _Rows) else value.expand(n_rows, *value.shape)


def _fixed_rows(what: object) -> ModelError:
    return ModelError(
        "a network whose operations torch can apply to any number of rows",
        received=f"{what}",
        remedy="LastLayerLaplace, whose exported module needs no derivatives; or save and load with this library.",
    )
