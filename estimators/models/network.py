"""Products of a network with its Jacobian J = ∂f/∂θ and with the Hessian of a loss of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vjp, vmap

from estimators.errors import EstimatorError, UnsupportedError
from estimators.models.disagreement import Disagreement
from estimators.models.failures import FAILURES, is_final_error, short
from estimators.models.input_derivatives import TOLERANCE, InputDerivative
from estimators.models.kernels import differentiable
from estimators.models.network_function import NetworkFunction
from estimators.models.outputs import without_inference
from estimators.models.self_check import unsaturated
from estimators.numerics.pytrees import PyTree, n_rows, row_as_batch, select_rows, tensors_of
from estimators.numerics.vectorize import over_rows
from estimators.runtime.pass_counter import SELF_CHECK

__all__ = ["VJP_BY_ROW", "Network"]

Loss = Callable[[Tensor], Tensor]
"""Outputs f (B, C) -> a scalar."""
HessianRoute = Callable[[Loss, Tensor], Tensor]
"""A loss and vectors v (K, P) -> its Hessian times these, (K, P)."""
VJP_BY_ROW = "rows of Jᵀ u"
"""Name of the products of each row in the report."""
_ROWS, _GRAPH_ROWS = "rows of J", "rows of J with a graph"
"""Name of the rows of J in the report."""
_INPUT_DERIVATIVE = "derivative of J by x"
_VECTORISED_ELEMENTS = 2**22
"""Numbers of parameters in all vectors of one vectorised call: beyond it, a call takes no less time per vector."""


class Network(NetworkFunction):
    """A network with its derivatives at θ̂, each by the fastest route that agrees with plain autograd.

        J v            plain rows of J if these are fewer than the vectors, forward mode, two reverse passes
        Jᵀ u           torch.func, plain autograd
        rows of J, and of Jᵀ u    torch.func vectorised over rows, plain autograd one row at a time
        H v            forward over reverse mode, plain autograd twice

    Args:
        model: the user's module; it is called, and never changed.
        names: the chosen parameters, the entries of θ.
        dtype: the dtype of the computation; None takes float32, or float64 if a weight has it.
        stored: differentiates the user's module if `model` is a copy of it in another dtype.

    Example:
        >>> import torch
        >>> network = Network(torch.nn.Linear(3, 2), ["weight", "bias"])
        >>> network.jacobian(torch.ones(5, 3)).shape
        torch.Size([5, 2, 8])
    """

    def jvp(self, x: PyTree, vectors: Tensor) -> Tensor:
        """Compute J v.

        Args:
            x: inputs of B rows.
            vectors: v (K, P).

        Returns:
            J v (K, B, C).

        Raises:
            ModelError: plain autograd fails on the user's module.
        """
        if n_rows(x) < len(vectors) and self.outputs(x).numel() < len(vectors):
            return self._jvp_of_few_rows(x, vectors)
        parts = []
        for some, is_due in self._calls("J v", x, vectors):
            # The result of a vmap rule may depend on how many vectors there are: as many probes, once per kind of x.
            count = len(some) if is_due and self.check.is_new("J v, vectorised", x, len(some)) else int(is_due)
            parts.append(self._jvp(x, some, self.check.random(some[:count])))
        return torch.cat(parts)

    def _jvp_of_few_rows(self, x: PyTree, vectors: Tensor) -> Tensor:
        """J v (K, B, C) by the rows of J, of plain autograd, if these are fewer than the vectors."""
        what = "J v at few rows"

        def difference(products: Tensor, weights: Tensor | None = None) -> Disagreement:
            c, u = self.check.random(vectors[:, 0]), weighted(self.check.cotangent(x, products[0]), weights)
            return self._directional_error(x, u, torch.tensordot(c, products, dims=1), c @ vectors)

        routes = [("rows of J by plain autograd", lambda: self._two_reverse_passes(x, vectors))]
        is_due = self.check.is_due(what, x, len(vectors))
        return self.routes.first_agreeing(self.check, what, x, routes, difference if is_due else None, difference)

    def _calls(self, what: str, x: PyTree, vectors: Tensor) -> Iterator[tuple[Tensor, bool]]:
        """The vectors of each vectorised call, and whether it is to be compared: once per number of vectors."""
        lengths = set[int]()
        for some in vectors.split(self.vectors_per_call):
            yield some, len(some) not in lengths and self.check.is_due(what, x, len(some))
            lengths.add(len(some))

    def _jvp(self, x: PyTree, vectors: Tensor, probes: Tensor) -> Tensor:
        """J v (K, B, C) of one vectorised call; it is compared if there are random probes (k, P), k > 0."""

        def difference(found: tuple[Tensor, Tensor], weights: Tensor | None = None) -> Disagreement:
            c, u = self.check.random(probes[:, 0]), weighted(self.check.cotangent(x, found[0][0]), weights)
            return self._directional_error(x, u, torch.tensordot(c, found[0], dims=1), c @ probes)

        def both(route: Callable[[PyTree, Tensor], Tensor], *, counted_as: str) -> Callable[[], tuple[Tensor, Tensor]]:
            def products() -> tuple[Tensor, Tensor]:
                if len(probes) == len(vectors):  # a call of its own with as many vectors
                    with self.check.counted():
                        of_probes = route(x, probes)
                    return of_probes, route(x, vectors)
                if not len(probes):  # without a copy of all vectors
                    return probes.new_zeros(0), route(x, vectors)
                images = route(x, torch.cat([probes, vectors]))
                self.pass_counter.move(SELF_CHECK, **{counted_as: len(probes) * n_rows(x)})
                return images[: len(probes)], images[len(probes) :].clone()  # callers write into them

            return products

        routes = [
            ("forward mode", both(self._forward_mode, counted_as="tangent")),
            ("two reverse passes", both(self._two_reverse_passes, counted_as="backward")),
            ("rows of J by plain autograd", lambda: self._jvp_by_rows(x, probes, vectors)),
        ]
        compared = difference if len(probes) else None
        return self.routes.first_agreeing(self.check, "J v", x, routes, compared, difference)[1]

    def _jvp_by_rows(self, x: PyTree, probes: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """J times probes and vectors by the rows of J."""
        jacobian = self._plain_rows(x)
        of_probes, products = (torch.einsum("bcp,kp->kbc", jacobian, some) for some in (probes, vectors))
        return of_probes, products

    def _directional_error(self, x: PyTree, u: Tensor, jvp: Tensor, r: Tensor) -> Disagreement:
        """The error of ⟨u, jvp⟩ for jvp = J r against plain autograd."""
        return self.check.directional_error(x, u, jvp, r)

    def _forward_mode(self, x: PyTree, vectors: Tensor) -> Tensor:
        """J v (K, B, C) by forward mode."""

        def one(v: Tensor) -> Tensor:
            product: Tensor = jvp(self.at(x), (self.theta,), (v,))[1]
            return product

        with differentiable(), torch.no_grad(), self.pass_counter.transformed(tangent=len(vectors)) as counted:
            products: Tensor = vmap(counted(one))(vectors)
        return products

    def _two_reverse_passes(self, x: PyTree, vectors: Tensor) -> Tensor:
        """J v (K, B, C) by two reverse passes on the user's module."""
        return self.check.reference.jvp(x, vectors)

    def _plain_rows(self, x: PyTree) -> Tensor:
        """J (B, C, P) by plain autograd, one row at a time."""
        return self.check.reference.jacobian(x, self.theta.dtype)

    def vjp(self, x: PyTree, cotangents: Tensor) -> Tensor:
        """Compute Jᵀ u, summed over rows.

        Args:
            x: inputs of B rows.
            cotangents: u (K, B, C).

        Returns:
            Jᵀ u (K, P).

        Raises:
            ModelError: plain autograd fails on the user's module.
        """
        return self.outputs_and_vjp(x, lambda _: cotangents)[1]

    def outputs_and_vjp(
        self, x: PyTree, cotangents: Callable[[Tensor], Tensor], total: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute the outputs f and Jᵀ u for cotangents u that depend on f, with one forward.

        Args:
            x: inputs of B rows.
            cotangents: f (B, C) -> u (K, B, C).
            total: (K, P), to which the products are added in place. With millions of parameters every copy counts.

        Returns:
            f (B, C), and Jᵀ u (K, P) summed over rows, or `total`.

        Raises:
            ModelError: plain autograd fails on the user's module.
        """
        what = "Jᵀ u"
        if self.routes.first.get(what, 0):
            f, products = self._plain_vjp(x, cotangents)
            with torch.no_grad():
                return f, products if total is None else total.add_(products)
        pulls = _Pulls(self, x)
        f = pulls.outputs()
        u = cotangents(f)
        total = self.theta.new_zeros(len(u), self.n_parameters) if total is None else total
        parts = total.split(self.vectors_per_call)
        for part, (some, is_due) in zip(parts, self._calls(what, x, u), strict=True):
            products = self._vjp(what, x, some, pulls, is_due=is_due)
            with torch.no_grad():  # the caller's mode may be another than that in which `total` was split
                part += products
        return f, total

    def _vjp(self, what: str, x: PyTree, u: Tensor, pulls: _Pulls, *, is_due: bool) -> Tensor:
        """Jᵀ u (K, P) of one vectorised call."""

        def difference(products: Tensor) -> Disagreement:
            c = self.check.random(products[:, 0])
            return self.gradient_error(x, torch.tensordot(c.to(u), u, dims=1), c @ products)

        self.pass_counter.backward(len(u) * n_rows(x))
        routes = [
            ("torch.func", lambda: pulls(u)),
            ("plain autograd", lambda: self._plain_vjp(x, lambda _: u)[1]),
        ]
        return self.routes.first_agreeing(self.check, what, x, routes, difference if is_due else None)

    def _plain_vjp(self, x: PyTree, cotangents: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """f (B, C) and Jᵀ u (K, P) by plain autograd."""
        dtype = self.theta.dtype
        f, products = self.check.reference.outputs_and_vjp(x, lambda f: cotangents(f.to(dtype)))
        return f.to(dtype), products.to(dtype)

    def gradient_error(self, x: PyTree, u: Tensor, product: Tensor, names: Sequence[str] | None = None) -> Disagreement:
        """Compare a product with Jᵀu by plain autograd.

        Args:
            x: inputs of B rows.
            u: a cotangent (B, C).
            product: what should be Jᵀu (P,), or (P',) over the parameters `names`.
            names: the parameters that `product` is over; None for all.

        Returns:
            The parameter with the largest relative error, and this error.

        Raises:
            ModelError: the gradient by plain autograd is not finite.
        """
        return self.check.gradient_error(x, u, product, names)

    def gradient_of(self, x: PyTree, loss: Loss) -> Tensor:
        """Compute the gradient at θ̂ of a loss of the outputs, by Jᵀ(∂loss/∂f).

        Args:
            x: inputs of B rows.
            loss: f (B, C) -> a scalar.

        Returns:
            The gradient (P,).

        Raises:
            ModelError: plain autograd fails on the user's module.
        """

        def by_outputs(f: Tensor) -> Tensor:
            with torch.enable_grad():
                leaf = f.detach().requires_grad_()
                return torch.autograd.grad(loss(leaf), leaf)[0][None]

        return self.outputs_and_vjp(x, by_outputs)[1][0]

    def hessian_product(self, x: PyTree, loss: Loss, vectors: Tensor) -> Tensor:
        """Compute ∇²loss(f(x; θ)) v at θ̂.

        Args:
            x: inputs of B rows.
            loss: f (B, C) -> a scalar.
            vectors: v (K, P).

        Returns:
            The products (K, P).

        Raises:
            UnsupportedError: an operation of the network cannot be differentiated twice.
        """
        calls = self._calls("Hessian products", x, vectors)
        return torch.cat([self._hessian_product(x, loss, some, is_due=is_due) for some, is_due in calls])

    def _hessian_product(self, x: PyTree, loss: Loss, vectors: Tensor, *, is_due: bool) -> Tensor:
        """∇²loss v (K, P) of one vectorised call."""
        fast, plain = partial(self._forward_over_reverse, x), partial(self._plain_hessian_product, x)

        def difference(found: tuple[Tensor, HessianRoute]) -> Disagreement:
            products, route = found
            c = self.check.random(vectors[:, 0])
            v = c @ vectors
            with self.check.counted():
                expected = plain(loss, v[None])[0]

            def usual() -> tuple[Tensor, Tensor]:
                r = self.check.random(v)
                r = r * (v.norm() / r.norm())
                smooth = unsaturated(loss, self.outputs(x))
                return route(smooth, r[None])[0], plain(smooth, r[None])[0]

            return self.check.curvature_error(c @ products, expected, usual)

        routes = [
            ("forward over reverse mode", lambda: (fast(loss, vectors), fast)),
            ("plain autograd, twice", lambda: (plain(loss, vectors), plain)),
        ]
        what = "Hessian products"
        return self.routes.first_agreeing(self.check, what, x, routes, difference if is_due else None)[0]

    def _forward_over_reverse(self, x: PyTree, loss: Loss, vectors: Tensor) -> Tensor:
        """H v (K, P) by forward mode over the gradient."""
        gradient, k = grad(lambda theta: loss(self(theta, x))), len(vectors)

        def product(v: Tensor) -> Tensor:  # v → H v
            image: Tensor = jvp(gradient, (self.theta,), (v,))[1]
            return image

        with differentiable(), self.pass_counter.transformed(tangent=k, backward=k, backward_per_call=1) as counted:
            images: Tensor = vmap(counted(product))(vectors).detach()
        return images

    def _plain_hessian_product(self, x: PyTree, loss: Loss, vectors: Tensor) -> Tensor:
        """H v (K, P) by plain autograd twice."""
        try:
            return self.check.reference.hessian_product(x, loss, vectors)
        except EstimatorError:
            raise
        except RuntimeError as error:
            raise UnsupportedError(
                'a network that can be differentiated twice for curvature="hessian"',
                received=f"one for which torch says: {short(error)}",
                remedy='curvature="ggn", which needs first derivatives only.',
            ) from error

    def jacobian(self, x: PyTree) -> Tensor:
        """Compute the rows of J by reverse mode, vectorised over rows if that is right.

        Args:
            x: inputs of B rows.

        Returns:
            J (B, C, P).

        Raises:
            ModelError: plain autograd fails, or the gradient of a row depends on the other rows.
        """
        routes = [
            ("torch.func, vectorised over rows", lambda: self._vectorised_rows(x)),
            ("plain autograd, one row at a time", lambda: self._plain_rows(x)),
        ]
        of_rows = partial(self._rows_error, x)
        return self.routes.first_agreeing(self.check, _ROWS, x, routes, self._rows_difference(x), of_rows)

    def jacobian_with_graph(self, x: PyTree) -> Tensor:
        """Compute the rows of J as differentiable functions of x, by plain autograd, row by row and output by output.

        torch.func is not used here: vmap over reverse mode, as in jacrev, has the right gradient by the weights of
        layer_norm and instance_norm, but the derivative of that by x is wrong by tens of per cent.

        Args:
            x: inputs of B rows, of which a tensor requires a gradient.

        Returns:
            J (B, C, P) with a graph.

        Raises:
            UnsupportedError: the network cannot be differentiated one row at a time, or J disagrees with that of the
                user's module, or its derivative by x with finite differences (in float64).
        """
        difference = self._rows_difference(x, _GRAPH_ROWS)
        rows = n_rows(x)
        try:
            jacobian = torch.stack([self._row_with_graph(select_rows(x, slice(i, i + 1))) for i in range(rows)])
        except EstimatorError:
            raise
        except FAILURES as error:
            raise _no_graph(f"one for which torch.autograd.grad says: {short(error)}") from error
        state = self.check.random_state()
        found = None if difference is None else difference(jacobian.detach())
        if found is not None:
            of_rows = partial(self._rows_error, x, jacobian.detach())
            if not self.check.agrees(found, _GRAPH_ROWS, x, of_rows, state):
                raise _no_graph(f"one whose Jacobian of a row alone {found}")
            self.check.report.record_agreement(_GRAPH_ROWS, rows, found.error)
        self._check_input_derivative(x, jacobian)
        return jacobian

    def _check_input_derivative(self, x: PyTree, jacobian: Tensor) -> None:
        """Raise UnsupportedError if the derivative of J by x is wrong; once for each kind of inputs, in float64."""
        dtypes = {self.theta.dtype, *(t.dtype for t in tensors_of(x) if t.requires_grad)}
        if dtypes != {torch.float64} or not len(jacobian) or not self.check.is_new(_INPUT_DERIVATIVE, x):
            return
        derivative = InputDerivative(
            self.check,
            vjp=lambda row, u: self._plain_vjp(row, lambda _: u[None])[1][0],
            jacobian=lambda row: self._row_with_graph(row)[None],
        )
        error = derivative.error(x, jacobian)
        if error > TOLERANCE:
            self.check.forget(_INPUT_DERIVATIVE, x)
            raise _no_graph(
                "one for which the derivative of the Jacobian by x differs from finite differences, with a relative "
                f"error of {error:.2g}: a torch.autograd.Function whose backward cannot be differentiated, or is not "
                "that of its forward; a gradient hook; or a part of the forward without a gradient"
            )

    def _row_with_graph(self, row: PyTree) -> Tensor:
        """J (C, P) of one row with a graph, by a backward pass per output."""
        with torch.enable_grad(), differentiable():
            theta = self.theta.detach().requires_grad_()  # of its own: backward() must not write into the model
            outputs = self(theta, row)[0]
            self.pass_counter.backward(len(outputs))
            gradients = [
                torch.autograd.grad(f, theta, create_graph=True, allow_unused=True)[0] if f.requires_grad else None
                for f in outputs
            ]
            return torch.stack([torch.zeros_like(theta) if g is None else g for g in gradients])

    def shaped_with_graph(self, x: PyTree) -> Tensor:
        """Compute the outputs at θ̂ in the model's shape, as differentiable functions of x.

        Args:
            x: inputs of B rows, of which a tensor requires a gradient.

        Returns:
            f (B, ...) with a graph.

        Raises:
            UnsupportedError: outputs at θ̂ are those of the user's module, and not of a copy.
        """
        if self.routes.outputs_by_user_module:
            raise _no_graph("one whose outputs a copy of it does not reproduce")
        with torch.enable_grad():
            return self.shaped(self.params, x)

    @property
    def jacobian_backend(self) -> str:
        """The route to the rows of J: "torch.func", or "autograd" if that disagrees with plain autograd."""
        return "autograd" if self.routes.first.get(_ROWS, 0) else "torch.func"

    def _rows_difference(self, x: PyTree, what: str = _ROWS) -> Callable[[Tensor], Disagreement] | None:
        """The comparison of J (B, C, P) at x, Σ u J against Jᵀu; None if it is not due."""
        return partial(self._rows_error, x) if self.check.is_due(what, x) else None

    def _rows_error(self, x: PyTree, jacobian: Tensor, weights: Tensor | None = None) -> Disagreement:
        """The error of Σ u J against Jᵀu, with weights (B,) of the rows."""
        u = weighted(self.check.cotangent(x, jacobian[..., 0]), weights)
        return self.gradient_error(x, u, torch.einsum("bc,bcp->p", u, jacobian))

    def _vectorised_rows(self, x: PyTree) -> Tensor:
        """J (B, C, P) by reverse mode, vectorised over rows."""

        def one(row: PyTree) -> Tensor:
            jacobian: Tensor = jacrev(lambda theta: self(theta, row_as_batch(row))[0])(self.theta)
            return jacobian

        rows = n_rows(x)
        with differentiable(), self.pass_counter.transformed(forward=rows) as counted:
            jacobian: Tensor = over_rows(counted(one), x).detach()
        self.pass_counter.backward(rows * jacobian.shape[1])
        return jacobian

    def vjp_by_row(self, x: PyTree, cotangents: Tensor) -> Tensor:
        """Compute Jᵀ u of each row, without a sum over rows, vectorised over rows if that is right.

        Args:
            x: inputs of B rows.
            cotangents: u (B, K, C).

        Returns:
            Jᵀ u (B, K, P).

        Raises:
            ModelError: plain autograd fails, or the gradient of a row depends on the other rows.
        """
        what = VJP_BY_ROW
        routes = [
            ("torch.func, vectorised over rows", lambda: self._vectorised_vjp(x, cotangents)),
            ("plain autograd, one row at a time", lambda: self._plain_vjp_by_row(x, cotangents)),
        ]

        def difference(products: Tensor, weights: Tensor | None = None) -> Disagreement:
            c = weighted(self.check.random(cotangents[..., 0]), weights)
            u = torch.einsum("bk,bkc->bc", c, cotangents)
            return self.gradient_error(x, u, torch.einsum("bk,bkp->p", c, products))

        is_due = self.check.is_due(what, x, cotangents.shape[1])
        return self.routes.first_agreeing(self.check, what, x, routes, difference if is_due else None, difference)

    def _vectorised_vjp(self, x: PyTree, cotangents: Tensor) -> Tensor:
        """Jᵀ u (B, K, P) by torch.func, vectorised over rows."""

        def one(row: PyTree, u: Tensor) -> Tensor:
            pull = vjp(lambda theta: self(theta, row_as_batch(row))[0], self.theta)[1]
            products: Tensor = vmap(pull)(u)[0]
            return products

        rows, k = cotangents.shape[:2]
        with differentiable(), self.pass_counter.transformed(forward=rows, backward=rows * k) as counted:
            products: Tensor = over_rows(counted(one), x, cotangents).detach()
        return products

    def _plain_vjp_by_row(self, x: PyTree, cotangents: Tensor) -> Tensor:
        """Jᵀ u (B, K, P) by plain autograd, one row at a time."""
        products = [
            self.check.reference.vjp(select_rows(x, slice(i, i + 1)), u[:, None]) for i, u in enumerate(cotangents)
        ]
        return torch.stack(products).to(self.theta.dtype)

    @property
    def vectors_per_call(self) -> int:
        """How many parameter vectors one vectorised call takes, at least 1."""
        every = self.n_parameters + sum(p.numel() for p in self.frozen.values())  # activations grow with all of them
        return max(1, _VECTORISED_ELEMENTS // every)


def weighted(u: Tensor, weights: Tensor | None) -> Tensor:
    """Cotangents u (B, ...) times weights (B,) of the rows; u itself without weights."""
    return u if weights is None else u * weights.to(u).reshape(-1, *(1 for _ in u.shape[1:]))


def _no_graph(received: str) -> UnsupportedError:
    """The error for a network whose Jacobian cannot be differentiated by the inputs."""
    return UnsupportedError(
        "a network whose Jacobian is a differentiable function of the inputs, since x requires a gradient",
        received=received,
        remedy="x.detach() or torch.no_grad(), and finite differences of the results.",
    )


class _Pulls:
    """u -> Jᵀu at some rows by torch.func, after one forward per way to swap parameters."""

    def __init__(self, network: Network, x: PyTree) -> None:
        self._network, self._x = network, x
        self._made: dict[str, tuple[Tensor, Any]] = {}

    def outputs(self) -> Tensor:
        """f (B, C); by the module if torch.func fails."""
        try:
            return self._pull()[0]
        except FAILURES as error:
            if is_final_error(error):
                raise
            return self._network.outputs(self._x)

    def __call__(self, u: Tensor) -> Tensor:
        with differentiable():
            products: Tensor = vmap(self._pull()[1])(u)[0].detach()
        return products

    def _pull(self) -> tuple[Tensor, Any]:
        """f (B, C) and the function u -> Jᵀu, for the present way to swap parameters."""
        network, swap = self._network, self._network.routes.swap
        if swap not in self._made:
            with differentiable():
                f, pull = vjp(network.at(self._x), network.theta)[:2]
            self._made[swap] = without_inference(f.detach()), pull
        return self._made[swap]
