"""The user's own module, differentiated by plain `torch.autograd` at its own weights: the reference of every route.

Nothing is copied, swapped or vectorised: what a hook, a closure, a custom function or a `torch.no_grad()` block does in
the user's training loop, it does here. Every other way to a derivative is compared with this one, and replaced by it
where they disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from estimators.errors import EstimatorError
from estimators.models.kernels import differentiable
from estimators.models.outputs import output_tensor
from estimators.models.preserved_state import preserved_tensors
from estimators.models.subsets import Subset
from estimators.numerics.pytrees import PyTree, copied, forward_arguments, n_rows, select_rows, with_floats
from estimators.runtime.module_wrappers import plain_names, unwrapped
from estimators.runtime.pass_counter import PassCounter

__all__ = ["OwnModule", "fresh"]


class OwnModule:
    """f(x) of the user's module with a graph, and products with J = ∂f/∂θ over the parameters of `subset`.

    Args:
        model: the user's module; it is called, never changed.
        subset: the chosen parameters, θ (P,).

    Inputs and vectors may be of another floating-point dtype than the module: they are converted to its dtype, and
    results back to theirs.
    """

    def __init__(self, model: nn.Module, subset: Subset) -> None:
        self.model, self.subset = unwrapped(model), subset
        self.pass_counter, self._rows = PassCounter(), 0
        self._own_names: dict[str, str] = {}
        self._modes = {id(module): module.training for module in self.model.modules()}  # of the fit

    @property
    def parameters(self) -> list[Tensor]:
        """The chosen parameters, in the order of θ."""
        return self._named(self.subset.shapes)

    @property
    def input_dtype(self) -> torch.dtype:
        """Of the first floating-point parameter of the module, frozen or not: that of its inputs."""
        return next(p.dtype.to_real() for p in self.model.parameters() if p.is_floating_point() or p.is_complex())

    @property
    def coarsest_dtype(self) -> torch.dtype:
        """Of the parameters with the fewest digits."""
        floats = {p.dtype.to_real() for p in self.model.parameters() if p.is_floating_point() or p.is_complex()}
        return max(floats, key=lambda dtype: torch.finfo(dtype).eps)

    @property
    def dtype(self) -> torch.dtype:
        """Of the chosen parameters."""
        return self.parameters[0].dtype.to_real()

    def outputs(self, x: PyTree) -> Tensor:
        """f(x) in the model's shape (B, ...), without a graph."""
        with self._running(), torch.no_grad():
            return self._forward(x)

    def vjp(self, x: PyTree, cotangents: Tensor, names: Sequence[str] | None = None) -> Tensor:
        """Jᵀ u for cotangents u (K, B, C), summed over rows: (K, P); `names`: over these parameters only, (K, P')."""
        return self.outputs_and_vjp(x, cotangents, names)[1]

    def outputs_and_vjp(
        self,
        x: PyTree,
        cotangents: Tensor | Callable[[Tensor], Tensor],
        names: Sequence[str] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """f (B, C) without a graph, and Jᵀ u for u (K, B, C), or for u = cotangents(f): (K, P)."""
        with self._running():
            f = self._forward(x).flatten(1)
            chosen, known = self._chosen(names), f.detach()
            u = cotangents if isinstance(cotangents, Tensor) else cotangents(known)
            if len(u) <= f.numel():
                products = torch.stack([self._pull(f, one, chosen) for one in u.to(f.dtype)])
            else:  # fewer backward passes by the rows of J
                products = u.to(f.dtype).flatten(1) @ self._rows_of(f, chosen).flatten(0, 1)
        return known, products.to(u.dtype)

    def jacobian(self, x: PyTree, dtype: torch.dtype) -> Tensor:
        """J at each row, (B, C, P) in `dtype`: a forward pass for each row, and a backward pass for each output.

        A module that does not take one row is given all rows together.
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
        """J v for vectors v (K, P): (K, B, C), by two reverse passes: J v = ∂⟨Jᵀu, v⟩/∂u.

        Raises:
            RuntimeError: an operation of the model cannot be differentiated twice.
        """
        with self._running():
            f = self._forward(x).flatten(1)
            if not f.requires_grad:
                return torch.zeros(len(vectors), *f.shape, dtype=vectors.dtype, device=f.device)
            if len(vectors) > f.numel():  # fewer backward passes by the rows of J
                rows = self._rows_of(f, self._chosen(None))
                return torch.einsum("bcp,kp->kbc", rows, vectors.to(f.dtype)).to(vectors.dtype)
            self.pass_counter.backward(self._rows * (1 + len(vectors)))
            u = torch.zeros_like(f, requires_grad=True)
            pulled = torch.autograd.grad(f, self._chosen(None), u, create_graph=True, allow_unused=True)
            products = [self._along(pulled, v, u) for v in vectors.to(f.dtype)]
        return torch.stack(products).to(vectors.dtype)

    def _along(self, pulled: Sequence[Tensor | None], vector: Tensor, u: Tensor) -> Tensor:
        """∂⟨Jᵀu, v⟩/∂u."""
        params = self.subset.unflatten(vector).values()
        total = _inner(pulled, params)
        total = u.sum() * 0 if total is None else total
        if not total.requires_grad:
            return torch.zeros_like(u)
        (product,) = torch.autograd.grad(total, u, retain_graph=True, allow_unused=True)
        return torch.zeros_like(u) if product is None else product.detach()

    def hessian_product(self, x: PyTree, loss: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
        """∇²ℓ(f(x; θ)) v at θ̂ for a scalar loss of the outputs f (B, C), and vectors (K, P): (K, P)."""
        with self._running():
            chosen = self._chosen(None)
            value = loss(self._forward(x).flatten(1).to(vectors.dtype))
            self.pass_counter.backward(self._rows * (1 + 2 * len(vectors)))
            slopes = torch.autograd.grad(value, chosen, create_graph=True, allow_unused=True)
            return torch.stack([self._curved(slopes, v, chosen) for v in vectors])

    def _curved(self, slopes: Sequence[Tensor | None], vector: Tensor, chosen: list[Tensor]) -> Tensor:
        params = self.subset.unflatten(vector).values()
        total = _inner(slopes, params)
        total = vector.sum() * 0 if total is None else total
        if not total.requires_grad:
            return torch.zeros_like(vector)
        products = torch.autograd.grad(total, chosen, retain_graph=True, allow_unused=True)
        return _flat(products, chosen)

    def _jacobian(self, x: PyTree) -> Tensor:
        """J (B, C, P), of all rows of x in one forward pass, by a backward pass for each row and output."""
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

    def _pull(self, f: Tensor, u: Tensor, chosen: list[Tensor]) -> Tensor:
        """Jᵀ u, (P,): 0 where no gradient arrives."""
        if not f.requires_grad:
            return _flat([None] * len(chosen), chosen)
        if len(chosen) == len(self.subset.shapes):  # to a few last ones it is next to nothing
            self.pass_counter.backward(self._rows)
        return _flat(torch.autograd.grad(f, chosen, u, retain_graph=True, allow_unused=True), chosen)

    def _chosen(self, names: Sequence[str] | None) -> list[Tensor]:
        if names is None:
            return self.parameters
        return self._named(names)

    def _named(self, names: Iterable[str]) -> list[Tensor]:
        """Parameters by their names without wrappers."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        if not self._own_names.keys() >= set(names):
            self._own_names = {plain: own for own, plain in plain_names(self.model, named)}
        return [named[self._own_names[name]] for name in names]

    def _forward(self, x: PyTree) -> Tensor:
        """Of copies of the inputs, into which a forward may write."""
        self._rows = n_rows(x)
        self.pass_counter.forward(self._rows)
        x = with_floats(fresh(x), self.input_dtype)
        arguments, keywords = forward_arguments(x)
        f = output_tensor(self.model(*arguments, **keywords))
        return f.clone() if f.is_inference() else f

    @contextmanager
    def _running(self) -> Iterator[None]:
        """With gradients, in the modes of the fit; the module's own modes and requires_grad are put back."""
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


def fresh(x: PyTree) -> PyTree:
    """Copies of the tensors of x."""
    return copied(x)


def _flat(slopes: Sequence[Tensor | None], chosen: Sequence[Tensor]) -> Tensor:
    """(P,) of slopes by parameter; sparse ones made dense, complex ones pairs of reals."""
    pairs = zip(slopes, chosen, strict=True)
    dense = (torch.zeros_like(p) if g is None else g.detach().to_dense().resolve_conj() for g, p in pairs)
    return torch.cat([(torch.view_as_real(g) if g.is_complex() else g).flatten() for g in dense])


def _inner(slopes: Sequence[Tensor | None], params: Iterable[Tensor]) -> Tensor | None:
    """Σ of slopes times pieces, over pairs of reals where these are complex; None where no slope arrives."""
    found = [(g.to_dense(), v) for g, v in zip(slopes, params, strict=True) if g is not None]
    terms = [(g.conj() * v).sum().real if g.is_complex() else (g * v).sum() for g, v in found]
    return torch.stack(terms).sum() if terms else None
