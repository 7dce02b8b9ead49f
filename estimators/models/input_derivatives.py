"""The derivative of the Jacobian J = ∂f/∂θ by the inputs, against finite differences of J by plain autograd.

Autograd differentiates J through the backward passes of the network. A custom `torch.autograd.Function` may have a
right backward that autograd cannot differentiate: a tensor such as 2x, saved by `save_for_backward`, counts as a
constant. J is right then, and its derivative by x is wrong.

Compared is one number, s(x) = ⟨u, J(x) v⟩ at one row for random u (C,) and v (P,), along a random direction r of x:

    ⟨∂s/∂x, r⟩ by autograd    against    (s(x + εr) − s(x)) / ε   for positive and negative steps ε of several sizes

Beside a kink of the network, such as that of a ReLU, the differences disagree with each other, and say nothing. An x on
a kink, such as x = 0 in a network without biases, may have equal differences on both sides, and another derivative by
autograd. Therefore a disagreement counts if it is found at a random x nearby, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from estimators.models.disagreement import relative_error
from estimators.models.self_check import SelfCheck
from estimators.numerics.pytrees import PyTree, Shared, select_rows, tensors_of, without_graph

__all__ = ["TOLERANCE", "InputDerivative"]

TOLERANCE = 1e-2
"""Largest relative error of the derivative of J by the inputs that counts as right."""

_STEPS = (1e-7, -1e-7, 1e-6, -1e-6, 1e-5, -1e-5)
"""Displacements of x in float64, relative to the mean size of its entries."""
_ROUND_OFF = 1e-13
"""Round-off of s, relative to the norm of its terms."""
_SPREAD = 0.01
"""Largest range of the differences, relative to their distance from autograd, at which they are taken to be right."""
_NEARBY = 0.03
"""Distance from x to where a disagreement must be found again, relative to the mean size of its entries."""
_SMALLEST_SIZE = 1e-3
"""Least size of x to which displacements are relative, for inputs that are 0."""
_FIRST_ROW = slice(0, 1)


@dataclass(frozen=True)
class InputDerivative:
    """Compares the derivative of J by x with finite differences of J.

    In float64 only: in float32, a step that is large beside round-off crosses kinks.

    Args:
        check: the self-check of the network.
        vjp: (inputs of a row, u (1, C)) -> Jᵀu (P,) by plain autograd on the user's module.
        jacobian: inputs of a row -> J (1, C, P) with a graph to them.
    """

    check: SelfCheck
    vjp: Callable[[PyTree, Tensor], Tensor]
    jacobian: Callable[[PyTree], Tensor]

    def error(self, x: PyTree, jacobian: Tensor) -> float:
        """Return the relative error of the derivative of J by x at the first row.

        Args:
            x: inputs of B rows, of which a tensor requires a gradient.
            jacobian: J (B, C, P) with a graph to x.

        Returns:
            The error, relative to the norm of the terms of ⟨∂s/∂x, r⟩; 0 if x is at a kink, or the error is round-off.
        """
        error = self._error_at(x, jacobian)
        if error <= TOLERANCE:
            return error
        steps = [(_NEARBY * r).requires_grad_() for r in self._directions(x)]
        with torch.enable_grad():
            nearby = select_rows(_displaced(x, steps), _FIRST_ROW)
            return min(error, self._error_at(nearby, self.jacobian(nearby)))

    def _error_at(self, x: PyTree, jacobian: Tensor) -> float:
        """The relative error at the first row of x; 0 if the differences do not agree."""
        u, v = self.check.random(jacobian[0, :, 0]), self.check.random(jacobian[0, 0])
        directions = self._directions(x)
        terms = _derivative_terms(u @ jacobian[0] @ v, _moving(x), directions)
        found, scale = float(terms.sum()), float(terms.norm())

        def gradient(step: float) -> Tensor:  # Jᵀu (P,)
            row = select_rows(_displaced(x, [step * r for r in directions]), _FIRST_ROW)
            return self.vjp(without_graph(row), u[None])

        with torch.no_grad(), self.check.counted():
            at_x = v * gradient(0.0)
            differences = [float((v * gradient(step)).sum() - at_x.sum()) / step for step in _STEPS]
        if not math.isfinite(math.fsum(map(abs, [found, *differences]))):
            return 0.0
        pairs = zip(differences, _STEPS, strict=True)
        errors = [abs(d - found) - _ROUND_OFF * float(at_x.norm()) / abs(step) for d, step in pairs]
        smallest = min(errors)
        agree = max(differences) - min(differences) <= _SPREAD * smallest
        return relative_error(smallest, scale) if agree and smallest > 0 else 0.0

    def _directions(self, x: PyTree) -> list[Tensor]:
        """A random direction of the first row for each tensor that requires a gradient, in the size of its entries."""
        directions = []
        for tensor in (t.detach() for t in _moving(x)):
            direction = self.check.random(tensor) * tensor.abs().mean().clamp_min(_SMALLEST_SIZE)
            if tensor.ndim:
                direction[1:] = 0
            directions.append(direction)
        return directions


def _moving(x: PyTree) -> list[Tensor]:
    """The tensors of the inputs that require a gradient."""
    return [t for t in tensors_of(x) if t.requires_grad]


def _derivative_terms(value: Tensor, leaves: list[Tensor], directions: list[Tensor]) -> Tensor:
    """The terms of ⟨∂value/∂x, r⟩, one per entry of x."""
    if not value.requires_grad:
        return value.detach().new_zeros(1)
    gradients = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
    pairs = zip(gradients, directions, strict=True)
    return torch.cat([(r * 0 if g is None else r * g).flatten() for g, r in pairs])


def _displaced(x: PyTree, steps: list[Tensor]) -> PyTree:
    """The inputs, with the tensors that require a gradient moved by steps, and with a graph to these."""
    remaining = iter(steps)

    def moved(leaf: Tensor | Shared) -> Tensor | Shared:
        if isinstance(leaf, Shared):
            return Shared(leaf.value.detach() + next(remaining)) if leaf.value.requires_grad else leaf
        return leaf.detach() + next(remaining) if leaf.requires_grad else leaf

    return pytree.tree_map_only((Tensor, Shared), moved, x)
