"""The user's own module, differentiated by plain `torch.autograd` at its own weights: the reference of every route.

Nothing is copied, swapped or vectorised. A hook, a closure, a custom function or a `torch.no_grad()` block therefore
has the same effect as in the user's training loop. Every other route is compared with this one, and replaced by it if
they disagree.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from estimators.errors import EstimatorError
from estimators.models.kernels import differentiable
from estimators.models.outputs import output_tensor, without_inference
from estimators.models.preserved_state import preserved_tensors
from estimators.models.subsets import Subset
from estimators.numerics.pytrees import PyTree, copied, forward_arguments, n_rows, select_rows, with_floats
from estimators.runtime.module_wrappers import plain_names, unwrapped
from estimators.runtime.pass_counter import PassCounter

__all__ = ["UserModule"]

_PART = 2**15
"""Entries of a parameter that are multiplied together: some rows of so many fit into a cache."""


class UserModule:
    """f(x) of the user's module with a graph, and products with J = ∂f/∂θ over the parameters of `subset`.

    Args:
        model: the user's module; it is called, and never changed.
        subset: the chosen parameters, θ (P,).

    Attributes:
        dtype: the dtype of the chosen parameters.

    Inputs and vectors may have another floating-point dtype than the module. They are converted to its dtype, and
    results are converted back.
    """

    def __init__(self, model: nn.Module, subset: Subset) -> None:
        self.model, self.subset = unwrapped(model), subset
        self.pass_counter, self._rows = PassCounter(), 0
        self._own_names: dict[str, str] = {}
        self.dtype = self.parameters[0].dtype.to_real()
        self._modes = {id(module): module.training for module in self.model.modules()}  # of the fit

    def counted_by(self, pass_counter: PassCounter) -> UserModule:
        """A copy for the same module whose rows are counted by another counter."""
        other = copy.copy(self)
        other.pass_counter = pass_counter
        return other

    @property
    def parameters(self) -> list[Tensor]:
        """The chosen parameters, in the order of θ."""
        return self._named(self.subset.shapes)

    @property
    def input_dtype(self) -> torch.dtype:
        """The dtype of the inputs: that of the first floating-point parameter of the module, frozen or not."""
        return next(p.dtype.to_real() for p in self.model.parameters() if p.is_floating_point() or p.is_complex())

    @property
    def coarsest_dtype(self) -> torch.dtype:
        """The dtype of the parameters with the fewest digits."""
        floats = {p.dtype.to_real() for p in self.model.parameters() if p.is_floating_point() or p.is_complex()}
        return max(floats, key=lambda dtype: torch.finfo(dtype).eps)

    def outputs(self, x: PyTree) -> Tensor:
        """f(x) in the model's shape (B, ...), without a graph."""
        with self._running(), torch.no_grad():
            return self._forward(x)

    def vjp(self, x: PyTree, cotangents: Tensor, names: Sequence[str] | None = None) -> Tensor:
        """Jᵀ u (K, P), summed over rows, for cotangents u (K, B, C); (K, P') over the parameters `names` only."""
        return self.outputs_and_vjp(x, cotangents, names)[1]

    def outputs_and_vjp(
        self,
        x: PyTree,
        cotangents: Tensor | Callable[[Tensor], Tensor],
        names: Sequence[str] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """f (B, C) without a graph, and Jᵀ u (K, P) for u (K, B, C) or u = cotangents(f)."""
        with self._running():
            f = self._forward(x).flatten(1)
            chosen, known = self._chosen(names), f.detach()
            u = cotangents if isinstance(cotangents, Tensor) else cotangents(known)
            if len(u) <= f.numel():
                products = torch.stack([self._pull(f, one, chosen) for one in u.to(f.dtype)])
            else:  # fewer backward passes by the rows of J
                products = u.to(f.dtype).flatten(1) @ self._rows_of(f, chosen).flatten(0, 1)
        return known, products.to(u.dtype)

    @contextmanager
    def traced_outputs(self, x: PyTree, mode: TorchFunctionMode) -> Iterator[Tensor]:
        """f (B, C) with a graph, of a forward whose calls `mode` sees; backward passes belong inside the context."""
        with self._running():
            with mode:
                f = self._forward(x)
            yield f.flatten(1)

    def jacobian(self, x: PyTree, dtype: torch.dtype) -> Tensor:
        """J (B, C, P) in `dtype`, by a forward pass per row and a backward pass per output.

        A module that does not accept a single row is given all rows together.
        """
        rows = n_rows(x)
        try:
            parts = [self._jacobian(select_rows(x, slice(i, i + 1)))[0] for i in range(rows)]
        except EstimatorError:
            raise
        except (RuntimeError, ValueError, IndexError):
            return self._jacobian(x).to(dtype)
        return torch.stack(parts).to(dtype)

    def jvp(self, x: PyTree, vectors: Tensor) -> Tensor:
        """J v (K, B, C) for vectors v (K, P), by two reverse passes: J v = ∂⟨Jᵀu, v⟩/∂u.

        With fewer outputs than vectors, by a backward pass per row and output.

        Raises:
            RuntimeError: an operation of the model cannot be differentiated twice.
        """
        with self._running():
            f = self._forward(x).flatten(1)
            if not f.requires_grad:
                return torch.zeros(len(vectors), *f.shape, dtype=vectors.dtype, device=f.device)
            if len(vectors) > f.numel():  # fewer backward passes by the rows of J
                return self._products_with_rows(f, vectors.to(f.dtype)).to(vectors.dtype)
            self.pass_counter.backward(self._rows * (1 + len(vectors)))
            u = torch.zeros_like(f, requires_grad=True)
            pulled = torch.autograd.grad(f, self._chosen(None), u, create_graph=True, allow_unused=True)
            products = [_flat(self._inner_gradient(pulled, v, [u]), [u]).view_as(u) for v in vectors.to(f.dtype)]
        return torch.stack(products).to(vectors.dtype)

    def hessian_product(self, x: PyTree, loss: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
        """∇²ℓ(f(x; θ)) v (K, P) at θ̂, for a scalar loss ℓ of the outputs f (B, C) and vectors v (K, P)."""
        with self._running():
            chosen = self._chosen(None)
            value = loss(self._forward(x).flatten(1).to(vectors.dtype))
            self.pass_counter.backward(self._rows * (1 + 2 * len(vectors)))
            gradients = torch.autograd.grad(value, chosen, create_graph=True, allow_unused=True)
            return torch.stack([_flat(self._inner_gradient(gradients, v, chosen), chosen) for v in vectors])

    def _inner_gradient(
        self, tensors: Sequence[Tensor | None], vector: Tensor, by: list[Tensor]
    ) -> Sequence[Tensor | None]:
        """∂⟨t, v⟩/∂`by` for tensors t with a graph, by parameter, and a vector v (P,); None for a zero gradient."""
        total = _inner(tensors, self.subset.unflatten(vector).values())
        if total is None or not total.requires_grad:
            return [None] * len(by)
        return torch.autograd.grad(total, by, retain_graph=True, allow_unused=True)

    def _jacobian(self, x: PyTree) -> Tensor:
        """J (B, C, P) of all rows of x in one forward pass, by a backward pass per row and output."""
        with self._running():
            return self._rows_of(self._forward(x).flatten(1), self._chosen(None))

    def _rows_of(self, f: Tensor, chosen: list[Tensor]) -> Tensor:
        """∂f/∂θ (B, C, P) for f (B, C) with a graph."""
        size = sum(p.numel() * (1 + p.is_complex()) for p in chosen)
        jacobian = torch.empty(*f.shape, size, dtype=f.dtype, device=f.device)
        for b in range(f.shape[0]):
            for c in range(f.shape[1]):
                pick = torch.zeros_like(f)
                pick[b, c] = 1.0
                jacobian[b, c] = self._pull(f, pick, chosen)
        return jacobian

    def _products_with_rows(self, f: Tensor, vectors: Tensor) -> Tensor:
        """J v (K, B, C) by the rows of J, in parts: to copy them into one matrix takes longer if P is large."""
        chosen = self._chosen(None)
        gradients = [self._gradients(f, one.view_as(f), chosen) for one in torch.eye(f.numel()).to(f)]
        products = vectors.new_zeros(len(vectors), f.numel())
        parts = vectors.split(self.subset.sizes, dim=1)
        for part, parameter, rows in zip(parts, chosen, zip(*gradients, strict=True), strict=True):
            parts_of_rows = zip(*(_entries(row, parameter).to(f.dtype).split(_PART) for row in rows), strict=True)
            for some, part_of_rows in zip(part.split(_PART, dim=1), parts_of_rows, strict=True):
                products += some @ torch.stack(part_of_rows).T
        return products.view(-1, *f.shape)

    def _pull(self, f: Tensor, u: Tensor, chosen: list[Tensor]) -> Tensor:
        """Jᵀ u (P,), 0 for parameters that no gradient reaches."""
        return _flat(self._gradients(f, u, chosen), chosen)

    def _gradients(self, f: Tensor, u: Tensor, chosen: list[Tensor]) -> Sequence[Tensor | None]:
        """Jᵀ u by parameter, None for parameters that no gradient reaches."""
        if not f.requires_grad:
            return [None] * len(chosen)
        if len(chosen) == len(self.subset.shapes):  # a backward pass to the last layer costs next to nothing
            self.pass_counter.backward(self._rows)
        return torch.autograd.grad(f, chosen, u, retain_graph=True, allow_unused=True)

    def _chosen(self, names: Sequence[str] | None) -> list[Tensor]:
        """The parameters `names`, or all chosen ones."""
        return self.parameters if names is None else self._named(names)

    def _named(self, names: Iterable[str]) -> list[Tensor]:
        """Parameters by their names inside wrappers such as torch.compile."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        if not self._own_names.keys() >= set(names):
            self._own_names = {plain: own for own, plain in plain_names(self.model, named)}
        return [named[self._own_names[name]] for name in names]

    def _forward(self, x: PyTree) -> Tensor:
        """f (B, ...) with a graph, at copies of the inputs: a forward may write into them."""
        self._rows = n_rows(x)
        self.pass_counter.forward(self._rows)
        x = with_floats(copied(x), self.input_dtype)
        arguments, keywords = forward_arguments(x)
        return without_inference(output_tensor(self.model(*arguments, **keywords)))

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Enable gradients and the modes of the fit; restore the module's modes and requires_grad afterwards."""
        modes = [(own, own.training) for own in self.model.modules()]
        modes = [(own, training) for own, training in modes if self._modes.get(id(own), training) != training]
        frozen = [p for p in self.parameters if not p.requires_grad]
        try:
            for own, training in modes:
                own.training = self._modes.get(id(own), training)
            for p in frozen:
                p.requires_grad_(True)
            with torch.enable_grad(), differentiable(), preserved_tensors(self.model):
                yield
        finally:
            for own, training in modes:
                own.training = training
            for p in frozen:
                p.requires_grad_(False)


def _flat(gradients: Sequence[Tensor | None], chosen: Sequence[Tensor]) -> Tensor:
    """Gradients by parameter as one vector (P,); sparse ones become dense, complex ones pairs of real numbers."""
    return torch.cat([_entries(g, p) for g, p in zip(gradients, chosen, strict=True)])


def _entries(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    """The entries of the gradient of one parameter, (size,)."""
    dense = torch.zeros_like(parameter) if gradient is None else gradient.detach().to_dense().resolve_conj()
    return (torch.view_as_real(dense) if dense.is_complex() else dense).flatten()


def _inner(gradients: Sequence[Tensor | None], params: Iterable[Tensor]) -> Tensor | None:
    """⟨gradients, params⟩, real parts of the terms of complex ones; None if no parameter has a gradient."""
    found = [(g.to_dense(), v) for g, v in zip(gradients, params, strict=True) if g is not None]
    terms = [(g.conj() * v).sum().real if g.is_complex() else (g * v).sum() for g, v in found]
    return torch.stack(terms).sum() if terms else None
