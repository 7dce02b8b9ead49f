"""A network as a function of one flat vector: f(θ, x), and its products with the Jacobian J = ∂f/∂θ.

Outputs of any shape (B, ...) are rows (B, C) here, C counting all outputs of a row: the logits of all pixels, or of all
tokens. What estimators return has the shape that the model gave.

The user's module is never touched: a structural copy that shares its tensors is called functionally, with θ in place of
the chosen parameters and the rest detached.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import chain

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from estimators.errors import ModelError
from estimators.ledger import Ledger
from estimators.pytrees import PyTree, n_rows, row_as_batch
from estimators.recurrent import make_differentiable
from estimators.subsets import Subset
from estimators.vectorise import over_rows

__all__ = ["Network", "differentiable", "output_tensor", "structural_copy"]

_VECTORISED_ELEMENTS = 2**22


class Network:
    """f(θ, x) of shape (B, C), for θ (P,) over a subset of the parameters of `model`; `theta` is θ̂, a copy.

    `ledger` counts the rows that go through it.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.module = structural_copy(model)
        make_differentiable(self.module)
        self.subset = Subset.of(self.module, names)
        parameters = {name: p.detach() for name, p in self.module.named_parameters()}
        self.theta = self.subset.flatten(parameters).clone()
        self.frozen = {name: p for name, p in parameters.items() if name not in self.subset.shapes}
        self.ledger = Ledger()

    @property
    def n_parameters(self) -> int:
        """P."""
        return self.theta.numel()

    @property
    def pieces(self) -> dict[str, Tensor]:
        """θ̂ by name, parts of `theta`."""
        return self.subset.unflatten(self.theta)

    def __call__(self, theta: Tensor, x: PyTree) -> Tensor:
        """Outputs (B, C) at θ (P,)."""
        return self.with_pieces(self.subset.unflatten(theta), x)

    def with_pieces(self, pieces: dict[str, Tensor], x: PyTree) -> Tensor:
        """Outputs (B, C) with these tensors, by name, in place of the chosen parameters."""
        return self.shaped(pieces, x).flatten(1)

    def shaped(self, pieces: dict[str, Tensor], x: PyTree) -> Tensor:
        """Outputs (B, ...) as the model gives them, likewise."""
        arguments, keywords = ((), x) if isinstance(x, dict) else ((x,), {})
        self.ledger.forward(n_rows(x))
        with differentiable():
            return output_tensor(functional_call(self.module, {**self.frozen, **pieces}, arguments, keywords))

    def outputs(self, x: PyTree) -> Tensor:
        """f(θ̂, x), (B, C), without a graph."""
        return self.shaped_outputs(x).flatten(1)

    def shaped_outputs(self, x: PyTree) -> Tensor:
        """f(θ̂, x) as the model gives it, (B, ...), without a graph: by the module, whose weights are θ̂."""
        arguments, keywords = ((), x) if isinstance(x, dict) else ((x,), {})
        self.ledger.forward(n_rows(x))
        with torch.no_grad(), differentiable():
            return output_tensor(self.module(*arguments, **keywords))

    def at(self, x: PyTree) -> Callable[[Tensor], Tensor]:
        """θ -> f(θ, x)."""
        return lambda theta: self(theta, x)

    def jvp(self, x: PyTree, vectors: Tensor) -> Tensor:
        """J v for each of vectors (K, P): (K, B, C)."""

        def one(v: Tensor) -> Tensor:
            product: Tensor = jvp(self.at(x), (self.theta,), (v,))[1]
            return product

        with differentiable(), torch.no_grad(), self.ledger.transformed(tangent=len(vectors)) as counted:
            products: Tensor = vmap(counted(one), chunk_size=self.vectors_at_once)(vectors)
        return products

    def vjp(self, x: PyTree, cotangents: Tensor) -> Tensor:
        """Jᵀ u for each of cotangents (K, B, C), summed over rows: (K, P)."""
        return self.outputs_and_vjp(x, lambda _: cotangents)[1]

    def outputs_and_vjp(
        self, x: PyTree, cotangents: Callable[[Tensor], Tensor], total: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """f (B, C), and Jᵀ u for each of cotangents(f) (K, B, C), summed over rows: (K, P). One forward.

        They are added to `total` (K, P), where it is given: with millions of parameters every copy counts.
        """
        with differentiable():
            pulled = vjp(self.at(x), self.theta)
            f, pull = pulled[0], pulled[1]
            u = cotangents(f.detach())
            total = self.theta.new_zeros(len(u), self.n_parameters) if total is None else total
            for part, some in zip(total.split(self.vectors_at_once), u.split(self.vectors_at_once), strict=True):
                part += vmap(pull)(some)[0].detach()
        self.ledger.backward(len(u) * n_rows(x))
        return f.detach(), total

    def jacobian(self, x: PyTree) -> Tensor:
        """J at each row, (B, C, P): reverse mode, vectorised over rows where the model allows."""

        def one(row: PyTree) -> Tensor:
            slope: Tensor = jacrev(lambda theta: self(theta, row_as_batch(row))[0])(self.theta)
            return slope

        rows = n_rows(x)
        with differentiable(), self.ledger.transformed(forward=rows) as counted:
            jacobian: Tensor = over_rows(counted(one), x).detach()
        self.ledger.backward(rows * jacobian.shape[1])
        return jacobian

    @property
    def vectors_at_once(self) -> int:
        """How many parameter vectors are worth pushing through one vectorised call."""
        every = self.n_parameters + sum(p.numel() for p in self.frozen.values())  # activations grow with all of them
        return max(1, _VECTORISED_ELEMENTS // every)


def structural_copy(model: nn.Module) -> nn.Module:
    """New module objects around the same parameters, with buffers of their own (a forward may write to them).

    Hooks and swaps on the copy never reach the user's model. Tensors that a forward has left on a module (a cached
    activation, the weight of an old-style weight norm) are shared: those with a graph cannot be copied.
    """
    left = [t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor)]
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), left)}
    try:
        return copy.deepcopy(model, shared)
    except (RuntimeError, TypeError) as error:
        raise ModelError(
            "a model that copy.deepcopy can copy",
            received=f"one for which it says: {error}",
            remedy="remove tensors with a graph, locks and open files from the attributes of its modules.",
        ) from error


def output_tensor(output: object) -> Tensor:
    """The outputs (B, ...) of a model: a tensor, or the `.logits` of an object."""
    tensor = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(tensor, Tensor):
        raise ModelError(
            "a model that returns a tensor, or an object with a tensor `.logits`",
            received=f"an output of type {type(output).__name__}",
            remedy="wrap the model in a Module whose forward picks the tensor, or joins several (torch.cat).",
        )
    if tensor.ndim < 2:
        raise ModelError(
            "outputs of shape (B, C), or (B, ...) with several dimensions a row",
            received=f"shape {tuple(tensor.shape)}",
            remedy="give the output a last dimension, for instance .unsqueeze(-1), and the targets too.",
        )
    return tensor


@contextmanager
def differentiable() -> Iterator[None]:
    """Run attention through kernels that forward mode and vmap can differentiate; the settings are put back after."""
    _load_forward_rules()
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


@cache
def _load_forward_rules() -> None:
    """The first use of forward mode compiles torch's own rules with a deprecated call: keep its warning from users."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))
