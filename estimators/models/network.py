"""A network as a function of one flat vector: f(θ, x), and its products with the Jacobian J = ∂f/∂θ.

Outputs of any shape (B, ...) are rows (B, C) here, C counting all outputs of a row: the logits of all pixels, or of all
tokens. What estimators return has the shape that the model gave.

The user's module is never touched: a structural copy that shares its tensors is called functionally, with θ in place of
the chosen parameters and the rest detached.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

from estimators.errors import EstimatorError, ModelChangedError, ModelError, UnsupportedError
from estimators.models.derivative_routes import BY_IDENTITY, BY_NAME, FAILURES, DerivativeRoutes, is_ours, short
from estimators.models.fused_kernels import make_differentiable
from estimators.models.kernels import differentiable
from estimators.models.outputs import output_tensor
from estimators.models.own_module import OwnModule, fresh
from estimators.models.parameter_swap import ParameterSwap
from estimators.models.self_check import DISPLACED, OUTPUTS, Disagreement, SelfCheck
from estimators.models.structural_copy import structural_copy
from estimators.models.subsets import Subset
from estimators.models.working_dtype import in_dtype, is_converted, working_dtype
from estimators.numerics.pytrees import PyTree, forward_arguments, n_rows, row_as_batch, select_rows, tensors_of
from estimators.numerics.vectorize import over_rows
from estimators.runtime.module_wrappers import unwrap_children_, unwrapped
from estimators.runtime.pass_counter import PassCounter

__all__ = ["FAILURES", "Network", "differentiable", "output_tensor", "structural_copy"]

R = TypeVar("R")
QUERY = "query"

_VECTORISED_ELEMENTS = 2**22


class Network:
    """f(θ, x) of shape (B, C), for θ (P,) over a subset of the parameters of `model`; `theta` is θ̂, a copy.

    Products with J are taken by the fastest route that agrees with plain autograd on the user's own module:

        J v       forward mode, two reverse passes, rows of J
        Jᵀ u      torch.func, plain autograd
        rows      torch.func vectorised over rows, plain autograd one row at a time

    `check` holds the comparisons and their report (`estimators.models.self_check`); `pass_counter` counts the rows that
    go through the network. It is computed in `dtype`, or in the `working_dtype` of the model; `result_dtype` is that of
    the outputs of the model itself, known from the first of `shaped_outputs` on. `stored` differentiates the user's
    module where `model` is a copy of it.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        *,
        dtype: torch.dtype | None = None,
        stored: OwnModule | None = None,
    ) -> None:
        dtype = working_dtype(model) if dtype is None else dtype
        self.module = in_dtype(unwrap_children_(structural_copy(unwrapped(model))), dtype)
        self._stored = structural_copy(unwrapped(model)) if is_converted(self.module) else None
        self.result_dtype: torch.dtype | None = None
        make_differentiable(self.module)
        self.subset = Subset.of(self.module, names)
        parameters = {name: p.detach() for name, p in self.module.named_parameters()}
        self.theta = self.subset.flatten(parameters).clone()
        self.frozen = {name: p for name, p in parameters.items() if name not in self.subset.shapes}
        self.pass_counter = PassCounter()
        if self._stored is None:
            self.check = SelfCheck(OwnModule(model, self.subset), self.subset, self.pass_counter)
        else:  # a copy in the dtype of the computation is compared with closely, the module itself roughly
            own, stored = OwnModule(structural_copy(self.module), self.subset), stored or OwnModule(model, self.subset)
            self.check = SelfCheck(own, self.subset, self.pass_counter, stored)
        self.routes = DerivativeRoutes()

    def counted_anew(self) -> Network:
        """The same function with the routes that were found, and a ledger of its own."""
        other = copy.copy(self)
        other.pass_counter = PassCounter()
        other.check = self.check.counted_by(other.pass_counter)
        return other

    @property
    def n_parameters(self) -> int:
        """P."""
        return self.theta.numel()

    @property
    def input_dtypes(self) -> list[torch.dtype]:
        """Floating-point dtypes of the inputs that it takes: those of the stored weights, and that it computes in."""
        stored = () if self._stored is None else self._stored.parameters()
        return list(dict.fromkeys([*(p.dtype for p in stored if p.is_floating_point()), self.theta.dtype]))

    @property
    def target_dtypes(self) -> list[torch.dtype]:
        """Floating-point dtypes of the targets that it takes: those of inputs, and of the outputs of the model."""
        return [*self.input_dtypes, *([] if self.result_dtype is None else [self.result_dtype])]

    @property
    def params(self) -> dict[str, Tensor]:
        """θ̂ by name, parts of `theta`."""
        return self.subset.unflatten(self.theta)

    def __call__(self, theta: Tensor, x: PyTree) -> Tensor:
        """Outputs (B, C) at θ (P,)."""
        return self.functional_outputs(self.subset.unflatten(theta), x)

    def functional_outputs(self, params: dict[str, Tensor], x: PyTree) -> Tensor:
        """Outputs (B, C) with these tensors, by name, in place of the chosen parameters."""
        return self.shaped(params, x).flatten(1)

    def shaped(self, params: dict[str, Tensor], x: PyTree) -> Tensor:
        """Outputs (B, ...) as the model gives them with these tensors in place of the chosen parameters."""
        arguments, keywords = forward_arguments(self._protected(x))
        tensors = {**self.frozen, **params}
        self.pass_counter.forward(n_rows(x))
        with differentiable():
            if self.routes.swap == BY_NAME:
                f = output_tensor(functional_call(self.module, tensors, arguments, keywords))
            else:
                with ParameterSwap(self.module, tensors):
                    f = output_tensor(self.module(*arguments, **keywords))
        return f.to(self.theta.dtype)

    def outputs(self, x: PyTree) -> Tensor:
        """f(θ̂, x), (B, C), without a graph."""
        return self.shaped_outputs(x).flatten(1)

    def shaped_outputs(self, x: PyTree) -> Tensor:
        """f(θ̂, x) as the model gives it, (B, ...), without a graph: by the module, whose weights are θ̂."""
        self.pass_counter.forward(n_rows(x))
        if self.routes.outputs_by_own_module:
            return self.check.own.outputs(x).to(self.theta.dtype)
        given = self._protected(x)
        arguments, keywords = forward_arguments(given)
        versions = [tensor._version for tensor in tensors_of(given)]
        with torch.no_grad(), differentiable():
            try:
                f = output_tensor(self.module(*arguments, **keywords))
            except (KeyError, AttributeError, NameError) as error:  # state that the copy does not have
                f = self._outputs_of_own_module(x, error)
        if self.routes.writes_inputs is None:
            self.routes.written = self.routes.written or versions != [t._version for t in tensors_of(given)]
        if self.result_dtype is None:
            self.result_dtype = f.dtype if self._stored is None else self._dtype_as_stored(x)
        return _ordinary(f).to(self.theta.dtype)

    def _dtype_as_stored(self, x: PyTree) -> torch.dtype:
        """The dtype of the outputs of the model with its weights as they are stored, by one row."""
        arguments, keywords = forward_arguments(fresh(select_rows(x, slice(0, 1))))
        assert self._stored is not None
        try:
            with torch.no_grad():
                return output_tensor(self._stored(*arguments, **keywords)).dtype
        except RuntimeError as error:
            stored = ", ".join(sorted({str(p.dtype) for p in self._stored.parameters()}))
            raise ModelError(
                "a model that accepts its inputs with its weights as they are stored",
                received=f"weights in {stored}, for which its forward says: {error}",
                remedy="model.to(torch.float32), or casts between its parts.",
            ) from error

    def _outputs_of_own_module(self, x: PyTree, error: Exception) -> Tensor:
        f = self.check.own.outputs(x)
        self.routes.outputs_by_own_module = True
        reason = f"cannot be computed ({type(error).__name__}: {error})"
        self.check.give_up(OUTPUTS, "those of a copy of the module", reason, instead="the module itself is called")
        return f

    def _protected(self, x: PyTree) -> PyTree:
        """Copies of the inputs of a forward that writes into them, or may."""
        return x if self.routes.writes_inputs is False else fresh(x)

    def at(self, x: PyTree) -> Callable[[Tensor], Tensor]:
        """θ -> f(θ, x)."""
        return lambda theta: self(theta, x)

    # ------------------------------------------------------------------ checks

    def check_batch(self, x: PyTree, f: Tensor, *, what: str = "training row") -> Tensor:
        """The outputs (B, ...) of the user's own module, where those of the copy, f, are not the same.

        Raises:
            ModelError: the outputs of a row depend on the other rows.
        """
        if not self.check.enabled:
            return f
        with self.check.counted():
            return self._checked_batch(x, f, what=what)

    def _checked_batch(self, x: PyTree, f: Tensor, *, what: str) -> Tensor:
        apart = self.check.row_alone_error(x, f)
        if apart <= self.check.tolerance():
            self.check.seen(OUTPUTS, n_rows(x), apart)
            return f
        own = self.check.own.outputs(x)  # not alike: the copy, the other rows or chance
        if not torch.equal(own, self.check.own.outputs(x)):
            return f  # random: two passes over the data will show it
        self.check.check_rows_alone(x, own, what=what)
        if what == QUERY and not torch.equal(own, f):
            raise ModelChangedError(
                "the function that was fitted",
                received="a module whose outputs at this query are not those of its copy from the fit",
                remedy="fit again after changing hooks, attributes or submodules; load around the fitted network.",
            )
        if not torch.equal(own, f):
            self.routes.outputs_by_own_module = True
            reason = "differ from those of the module"
            self.check.give_up(OUTPUTS, "those of a copy of the module", reason, instead="the module itself is called")
        return own

    def check_query(self, x: PyTree, f: Tensor) -> Tensor:
        """`check_batch` at a query. Raises ModelChangedError for a module that is another function by now."""
        return self.check_batch(x, f, what=QUERY)

    def data_seen(self, n_data: int) -> None:
        """The training rows have been seen: their number is known, and what the forward does to its inputs."""
        self.check.n_data = n_data
        if self.routes.writes_inputs is None:
            self.routes.writes_inputs = self.routes.written

    def check_displaced(self, x: PyTree) -> None:
        """ModelError where f(θ, x) does not follow the slope of the user's module: weights cannot be displaced."""
        if not self.check.due(DISPLACED, x):
            return
        with self.check.counted():
            self.vjp(x, self.outputs(x)[None] * 0 + 1)  # a route by identity is found here
            with differentiable():
                self.check.check_displaced(x, lambda theta: self(theta, x), self.theta)
            self.pass_counter.backward(n_rows(x))
        self.check.seen(DISPLACED, n_rows(x), 0.0)

    def check_exchanged(self, x: PyTree, tensors: dict[str, Tensor], trained: nn.Module) -> None:
        """Check that these tensors, by name, make this network the `trained` one at x.

        Raises:
            ModelError: they do not, so that a network cannot be kept as its tensors.
        """
        expected = OwnModule(trained, self.subset).outputs(x).flatten(1)
        for swap in (BY_IDENTITY, BY_NAME):  # by identity first: no use of a tensor is missed, whatever the inputs
            self.routes.swap = swap
            with torch.no_grad(), self.check.counted():
                apart = (
                    float((self.functional_outputs(tensors, x) - expected).double().abs().max())
                    if len(expected)
                    else 0.0
                )
            if apart <= self.check.tolerance() * float(expected.double().abs().max().clamp_min(1e-300)):
                return
        raise ModelError(
            "networks that differ in the parameters and buffers of their modules only",
            received=f"one whose outputs differ by {apart:.2g} from those of its tensors in the module that was passed",
            remedy="register every tensor that training changes as a parameter or buffer of a submodule.",
        )

    def first_agreeing(
        self,
        what: str,
        x: PyTree,
        routes: Sequence[tuple[str, Callable[[], R]]],
        difference: Callable[[R], Disagreement] | None,
        *,
        last_is_plain: bool = True,
    ) -> R:
        """What the fastest of `routes` gives that agrees with plain autograd at x (`DerivativeRoutes`)."""
        return self.routes.first_agreeing(self.check, what, x, routes, difference, last_is_plain=last_is_plain)

    # ------------------------------------------------------------------ products

    def jvp(self, x: PyTree, vectors: Tensor) -> Tensor:
        """J v for each of vectors (K, P): (K, B, C)."""
        parts, lengths = [], set[int]()
        for some in vectors.split(self.vectors_at_once):
            count = 0
            if len(some) not in lengths and self.check.due("J v", x, len(some)):
                # What a vmap rule does may depend on how many vectors there are: as many, once for each kind.
                count = len(some) if self.check.is_new("J v, vectorised", x, len(some)) else 1
            lengths.add(len(some))
            parts.append(self._jvp(x, some, self.check.random(some[:count])))
        return torch.cat(parts)

    def _jvp(self, x: PyTree, vectors: Tensor, probes: Tensor) -> Tensor:
        """J v (K, B, C) of one vectorised call; random probes (k, P), k > 0, where it is to be compared."""

        def difference(found: tuple[Tensor, Tensor]) -> Disagreement:
            c, u = self.check.random(probes[:, 0]), self.check.cotangent(x, found[0][0])
            return self._along_error(x, u, torch.tensordot(c, found[0], dims=1), c @ probes)

        def both(route: Callable[[PyTree, Tensor], Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
            def products() -> tuple[Tensor, Tensor]:
                if len(probes) == len(vectors):  # a call of its own with as many vectors
                    with self.check.counted():
                        along = route(x, probes)
                    return along, route(x, vectors)
                images = route(x, torch.cat([probes, vectors]))
                return images[: len(probes)], images[len(probes) :].clone()  # callers write into them

            return products

        routes = [
            ("forward mode", both(self._forward_mode)),
            ("two reverse passes", both(self._two_reverse_passes)),
            ("rows of J by plain autograd", lambda: self._along_own_rows(x, probes, vectors)),
        ]
        return self.first_agreeing("J v", x, routes, difference if len(probes) else None)[1]

    def _along_own_rows(self, x: PyTree, probes: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        jacobian = self._own_rows(x)
        along, products = (torch.einsum("bcp,kp->kbc", jacobian, some) for some in (probes, vectors))
        return along, products

    def _along_error(self, x: PyTree, u: Tensor, along: Tensor, r: Tensor) -> Disagreement:
        return self.check.along_error(x, u, along, r)

    def _forward_mode(self, x: PyTree, vectors: Tensor) -> Tensor:
        def one(v: Tensor) -> Tensor:
            product: Tensor = jvp(self.at(x), (self.theta,), (v,))[1]
            return product

        with differentiable(), torch.no_grad(), self.pass_counter.transformed(tangent=len(vectors)) as counted:
            products: Tensor = vmap(counted(one))(vectors)
        return products

    def _two_reverse_passes(self, x: PyTree, vectors: Tensor) -> Tensor:
        return self.check.own.jvp(x, vectors)

    def _own_rows(self, x: PyTree) -> Tensor:
        return self.check.own.jacobian(x, self.theta.dtype)

    def vjp(self, x: PyTree, cotangents: Tensor) -> Tensor:
        """Jᵀ u for each of cotangents (K, B, C), summed over rows: (K, P)."""
        return self.outputs_and_vjp(x, lambda _: cotangents)[1]

    def outputs_and_vjp(
        self, x: PyTree, cotangents: Callable[[Tensor], Tensor], total: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """f (B, C), and Jᵀ u for each of cotangents(f) (K, B, C), summed over rows: (K, P). One forward.

        They are added to `total` (K, P), where it is given: with millions of parameters every copy counts.
        """
        what = "Jᵀ u"
        if self.routes.first.get(what, 0):
            f, products = self._own_pull(x, cotangents)
            with torch.no_grad():
                return f, products if total is None else total.add_(products)
        pulls = _Pulls(self, x)
        f = pulls.outputs()
        u = cotangents(f)
        total = self.theta.new_zeros(len(u), self.n_parameters) if total is None else total
        lengths = set[int]()
        for part, some in zip(total.split(self.vectors_at_once), u.split(self.vectors_at_once), strict=True):
            is_due = len(some) not in lengths and self.check.due(what, x, len(some))
            lengths.add(len(some))
            products = self._pulled(what, x, some, pulls, is_due=is_due)
            with torch.no_grad():  # the caller's mode may be another than that in which `total` was split
                part += products
        return f, total

    def _pulled(self, what: str, x: PyTree, u: Tensor, pulls: _Pulls, *, is_due: bool) -> Tensor:
        """Jᵀ u (K, P) of one vectorised call."""

        def difference(products: Tensor) -> Disagreement:
            c = self.check.random(products[:, 0])
            return self.slope_error(x, torch.tensordot(c.to(u), u, dims=1), c @ products)

        self.pass_counter.backward(len(u) * n_rows(x))
        routes = [
            ("torch.func", lambda: pulls(u)),
            ("plain autograd", lambda: self._own_pull(x, lambda _: u)[1]),
        ]
        return self.first_agreeing(what, x, routes, difference if is_due else None)

    def _own_pull(self, x: PyTree, cotangents: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        dtype = self.theta.dtype
        f, products = self.check.own.outputs_and_vjp(x, lambda f: cotangents(f.to(dtype)))
        return f.to(dtype), products.to(dtype)

    def slope_error(self, x: PyTree, u: Tensor, product: Tensor, names: Sequence[str] | None = None) -> Disagreement:
        """How far `product` is from Jᵀu (P,) by plain autograd, for u (B, C); over the parameters `names` only."""
        return self.check.slope_error(x, u, product, names)

    def slope_of(self, x: PyTree, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """∇ of a scalar loss of the outputs f (B, C) at θ̂: (P,), by Jᵀ(∂loss/∂f)."""

        def by_outputs(f: Tensor) -> Tensor:
            with torch.enable_grad():
                leaf = f.detach().requires_grad_()
                return torch.autograd.grad(loss(leaf), leaf)[0][None]

        return self.outputs_and_vjp(x, by_outputs)[1][0]

    def hessian_product(self, x: PyTree, loss: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
        """∇²loss(f(x; θ)) v at θ̂ for each of vectors (K, P): (K, P).

        Raises:
            UnsupportedError: an operation of the network cannot be differentiated twice.
        """
        parts, lengths = [], set[int]()
        for some in vectors.split(self.vectors_at_once):
            is_due = len(some) not in lengths and self.check.due("Hessian products", x, len(some))
            lengths.add(len(some))
            parts.append(self._hessian_product(x, loss, some, is_due=is_due))
        return torch.cat(parts)

    def _hessian_product(self, x: PyTree, loss: Callable[[Tensor], Tensor], vectors: Tensor, *, is_due: bool) -> Tensor:
        def difference(products: Tensor) -> Disagreement:
            c = self.check.random(vectors[:, 0])
            with self.check.counted():
                expected = self._own_hessian_product(x, loss, (c @ vectors)[None])[0]
            return self.check.compare_curved(c @ products, expected)

        routes = [
            ("forward over reverse mode", lambda: self._forward_over_reverse(x, loss, vectors)),
            ("plain autograd, twice", lambda: self._own_hessian_product(x, loss, vectors)),
        ]
        return self.first_agreeing("Hessian products", x, routes, difference if is_due else None)

    def _forward_over_reverse(self, x: PyTree, loss: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
        gradient, k = grad(lambda theta: loss(self(theta, x))), len(vectors)

        def product(v: Tensor) -> Tensor:  # v → H v
            image: Tensor = jvp(gradient, (self.theta,), (v,))[1]
            return image

        with differentiable(), self.pass_counter.transformed(tangent=k, backward=k, backward_per_call=1) as counted:
            images: Tensor = vmap(counted(product))(vectors).detach()
        return images

    def _own_hessian_product(self, x: PyTree, loss: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
        try:
            return self.check.own.hessian_product(x, loss, vectors)
        except EstimatorError:
            raise
        except RuntimeError as error:
            raise UnsupportedError(
                'a network that can be differentiated twice for curvature="hessian"',
                received=f"one for which torch says: {short(error)}",
                remedy='curvature="ggn", which needs first derivatives only.',
            ) from error

    def jacobian(self, x: PyTree) -> Tensor:
        """J at each row, (B, C, P): reverse mode, vectorised over rows where that is right."""
        routes = [("torch.func, vectorised over rows", lambda: self._vectorised_rows(x)), self.plain_rows(x)]
        return self.first_agreeing("rows of J", x, routes, self.rows_difference(x, "rows of J"))

    def plain_rows(self, x: PyTree) -> tuple[str, Callable[[], Tensor]]:
        """The last route to the rows of J."""
        return "plain autograd, one row at a time", lambda: self._own_rows(x)

    def rows_difference(self, x: PyTree, what: str) -> Callable[[Tensor], Disagreement] | None:
        """How rows J (B, C, P) are compared at x, where that is due: Σ u J with Jᵀu."""
        if not self.check.due(what, x):
            return None

        def difference(jacobian: Tensor) -> Disagreement:
            u = self.check.cotangent(x, jacobian[..., 0])
            return self.slope_error(x, u, torch.einsum("bc,bcp->p", u, jacobian))

        return difference

    def _vectorised_rows(self, x: PyTree) -> Tensor:
        def one(row: PyTree) -> Tensor:
            slope: Tensor = jacrev(lambda theta: self(theta, row_as_batch(row))[0])(self.theta)
            return slope

        rows = n_rows(x)
        with differentiable(), self.pass_counter.transformed(forward=rows) as counted:
            jacobian: Tensor = over_rows(counted(one), x).detach()
        self.pass_counter.backward(rows * jacobian.shape[1])
        return jacobian

    @property
    def vectors_at_once(self) -> int:
        """How many parameter vectors are worth pushing through one vectorised call."""
        every = self.n_parameters + sum(p.numel() for p in self.frozen.values())  # activations grow with all of them
        return max(1, _VECTORISED_ELEMENTS // every)


class _Pulls:
    """u -> Jᵀu at some rows by torch.func, after one forward for each way to exchange parameters."""

    def __init__(self, network: Network, x: PyTree) -> None:
        self._network, self._x = network, x
        self._made: dict[str, tuple[Tensor, Any]] = {}

    def outputs(self) -> Tensor:
        """f (B, C); by the module where torch.func cannot."""
        try:
            return self._pull()[0]
        except FAILURES as error:
            if is_ours(error):
                raise
            return self._network.outputs(self._x)

    def __call__(self, u: Tensor) -> Tensor:
        with differentiable():
            products: Tensor = vmap(self._pull()[1])(u)[0].detach()
        return products

    def _pull(self) -> tuple[Tensor, Any]:
        network, swap = self._network, self._network.routes.swap
        if swap not in self._made:
            with differentiable():
                f, pull = vjp(network.at(self._x), network.theta)[:2]
            self._made[swap] = _ordinary(f.detach()), pull
        return self._made[swap]


def _ordinary(f: Tensor) -> Tensor:
    """Outputs of a forward in inference mode as an ordinary tensor."""
    return f.clone() if f.is_inference() else f
