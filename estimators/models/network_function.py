"""A network as a function of one flat vector: f(θ, x).

Outputs of any shape (B, ...) are rows (B, C) here, C counting all outputs of a row: the logits of all pixels, or of all
tokens. What estimators return has the shape that the model gave.

The user's module is never touched: a structural copy that shares its tensors is called functionally, with θ in place of
the chosen parameters and all others detached.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from estimators.errors import ModelError
from estimators.models.derivative_routes import BY_NAME, DerivativeRoutes
from estimators.models.fused_kernels import use_plain_recurrent_kernels
from estimators.models.kernels import differentiable
from estimators.models.outputs import output_tensor, without_inference
from estimators.models.parameter_swap import ParameterSwap
from estimators.models.self_check import OUTPUTS, SelfCheck
from estimators.models.structural_copy import structural_copy
from estimators.models.subsets import Subset
from estimators.models.user_module import UserModule
from estimators.models.working_dtype import in_dtype, is_converted, working_dtype
from estimators.numerics.pytrees import PyTree, cloned, copied, forward_arguments, n_rows, select_rows, tensors_of
from estimators.runtime.module_wrappers import unwrap_children_, unwrapped
from estimators.runtime.pass_counter import PassCounter

__all__ = ["NetworkFunction"]


class NetworkFunction:
    """f(θ, x) of shape (B, C), for θ (P,) over a subset of the parameters of `model`.

    Attributes:
        module: the structural copy that is called.
        subset: the names and shapes of the chosen parameters.
        theta: θ̂ (P,), a copy of the chosen parameters.
        frozen: all other parameters, by name.
        routes: the routes to derivatives that are in use.
        check: compares derivatives with plain autograd, and keeps the report.
        pass_counter: counts the rows that go through the network.
        result_dtype: the dtype of the outputs of `model` itself; None before the first call of `shaped_outputs`.

    Args:
        model: the user's module.
        names: the chosen parameters.
        dtype: the dtype of the computation; None takes the `working_dtype` of the model.
        stored: differentiates the user's module if `model` is a copy of it in another dtype.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        *,
        dtype: torch.dtype | None = None,
        stored: UserModule | None = None,
    ) -> None:
        dtype = working_dtype(model) if dtype is None else dtype
        self.module = in_dtype(unwrap_children_(structural_copy(unwrapped(model))), dtype)
        self._as_stored = structural_copy(unwrapped(model)) if is_converted(self.module) else None
        self.result_dtype: torch.dtype | None = None
        use_plain_recurrent_kernels(self.module)
        self.subset = Subset.of(self.module, names)
        parameters = {name: p.detach() for name, p in self.module.named_parameters()}
        self.theta = self.subset.flatten(parameters).clone()
        self.frozen = {name: p for name, p in parameters.items() if name not in self.subset.shapes}
        self.pass_counter = PassCounter()
        reference = UserModule(model, self.subset)
        if self._as_stored is not None:  # compared closely with a copy in the dtype, roughly with the module itself
            stored = stored or reference
            reference = UserModule(structural_copy(self.module), self.subset)
        self.check = SelfCheck(reference, self.subset, self.pass_counter, None if self._as_stored is None else stored)
        self.routes = DerivativeRoutes()

    def counted_by(self, pass_counter: PassCounter) -> Self:
        """Return a copy that shares the module and the routes, and counts its rows with another counter."""
        other = copy.copy(self)
        other.pass_counter = pass_counter
        other.check = self.check.counted_by(pass_counter)
        return other

    @property
    def n_parameters(self) -> int:
        """P, the number of chosen parameters."""
        return self.theta.numel()

    @property
    def input_dtypes(self) -> list[torch.dtype]:
        """Floating-point dtypes that inputs may have: those of the stored weights, and that of the computation."""
        stored = () if self._as_stored is None else self._as_stored.parameters()
        return list(dict.fromkeys([*(p.dtype for p in stored if p.is_floating_point()), self.theta.dtype]))

    @property
    def target_dtypes(self) -> list[torch.dtype]:
        """Floating-point dtypes that targets may have: those of inputs, and that of the outputs of the model."""
        return [*self.input_dtypes, *([] if self.result_dtype is None else [self.result_dtype])]

    @property
    def params(self) -> dict[str, Tensor]:
        """θ̂ by name, as views of `theta`."""
        return self.subset.unflatten(self.theta)

    def __call__(self, theta: Tensor, x: PyTree) -> Tensor:
        """Outputs (B, C) at θ (P,)."""
        return self.functional_outputs(self.subset.unflatten(theta), x)

    def at(self, x: PyTree) -> Callable[[Tensor], Tensor]:
        """Return the function θ (P,) -> f(θ, x), (B, C)."""
        return lambda theta: self(theta, x)

    def functional_outputs(self, params: dict[str, Tensor], x: PyTree) -> Tensor:
        """Return f (B, C) with other tensors, by name, in place of the chosen parameters."""
        return self.shaped(params, x).flatten(1)

    def shaped(self, params: dict[str, Tensor], x: PyTree) -> Tensor:
        """Return f (B, ...), in the shape of the model, with other tensors, by name, for the chosen parameters."""
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
        """Return the outputs f (B, C) at θ̂, without a graph."""
        return self.shaped_outputs(x).flatten(1)

    def shaped_outputs(self, x: PyTree) -> Tensor:
        """Compute the outputs at θ̂ in the model's shape, without a graph, by the module, whose weights are θ̂.

        Args:
            x: inputs of B rows.

        Returns:
            f (B, ...).

        Raises:
            ModelError: the model does not accept its inputs with its weights as they are stored.
        """
        self.pass_counter.forward(n_rows(x))
        if self.routes.outputs_by_user_module:
            return self.check.reference.outputs(x).to(self.theta.dtype)
        given = self._protected(x)
        arguments, keywords = forward_arguments(given)
        versions = [tensor._version for tensor in tensors_of(given)]
        with torch.no_grad(), differentiable():
            try:
                f = output_tensor(self.module(*arguments, **keywords))
            except (KeyError, AttributeError, NameError) as error:  # state that the copy does not have
                f = self.check.reference.outputs(x)
                self.use_user_module(f"cannot be computed ({type(error).__name__}: {error})")
        if self.routes.writes_inputs is None:
            written = versions != [tensor._version for tensor in tensors_of(given)]
            self.routes.input_write_seen = self.routes.input_write_seen or written
        if self.result_dtype is None:
            self.result_dtype = f.dtype if self._as_stored is None else self._dtype_as_stored(self._as_stored, x)
        return without_inference(f).to(self.theta.dtype)

    def use_user_module(self, reason: str) -> None:
        """Compute outputs at θ̂ by the user's module from now on, and warn; `reason` is a verb phrase."""
        self.routes.outputs_by_user_module = True
        route, instead = "those of a copy of the module", "the module itself is called"
        self.check.report.record_fallback(OUTPUTS, route, reason, instead=instead)

    def record_training_rows(self, n_data: int) -> None:
        """Store N after the first pass over the training rows, and whether forwards wrote into inputs."""
        self.check.n_data = n_data
        if self.routes.writes_inputs is None:
            self.routes.writes_inputs = self.routes.input_write_seen

    def _protected(self, x: PyTree) -> PyTree:
        """Copies of the inputs, unless the forward is known not to write into them."""
        return x if self.routes.writes_inputs is False else cloned(x)

    @staticmethod
    def _dtype_as_stored(model: nn.Module, x: PyTree) -> torch.dtype:
        """The dtype of the outputs of a model with its weights as they are stored, at one row."""
        arguments, keywords = forward_arguments(copied(select_rows(x, slice(0, 1))))
        try:
            with torch.no_grad():
                return output_tensor(model(*arguments, **keywords)).dtype
        except RuntimeError as error:
            stored = ", ".join(sorted({str(p.dtype) for p in model.parameters()}))
            raise ModelError(
                "a model that accepts its inputs with its weights as they are stored",
                received=f"weights in {stored}, for which its forward says: {error}",
                remedy="model.to(torch.float32), or casts between its parts.",
            ) from error
