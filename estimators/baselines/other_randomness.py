"""Find random operations of a network in train mode that belong to no dropout layer, such as a call of F.dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from estimators.baselines.dropout_layers import dropout_names
from estimators.errors import UnsupportedError
from estimators.models.derivative_routes import FAILURES, is_final_error
from estimators.models.network import Network
from estimators.models.preserved_state import preserved_tensors
from estimators.numerics.pytrees import PyTree, tensors_of
from estimators.runtime.rng import seeded_random_state

__all__ = ["check_other_randomness"]

_STAYS_OFF = frozenset(
    ("multi_head_attention_forward", "scaled_dot_product_attention", "lstm", "gru", "rnn_tanh", "rnn_relu", "rrelu")
)
"""Functions of torch whose randomness is documented to stay off: attention, recurrent layers, random slopes."""
_EVAL = (_NormBase, nn.MultiheadAttention, nn.RNNBase)
"""Layers that stay in eval mode: batch statistics are frozen, and dropout between recurrent layers is off."""


def check_other_randomness(network: Network, x: PyTree) -> None:
    """Check that in train mode nothing is random but the dropout layers.

    The network is run in train mode, but for its dropout layers, with two seeds. Its outputs must be the same, and no
    function for dropout may draw random numbers. Buffers and modes of the network do not change.

    Args:
        network: the network.
        x: inputs of some rows.

    Raises:
        UnsupportedError: something else is random, which would stay off in the members of MC dropout.
    """
    modes = [(module, module.training) for module in network.module.modules()]
    recorded, layers = _RandomCalls(x), dropout_names(network.module)
    try:
        for name, module in network.module.named_modules():
            module.training = name not in layers and not isinstance(module, _EVAL)
        outputs = [_outputs(network, x, seed, recorded) for seed in range(2)]
    finally:
        for module, training in modes:
            module.training = training
    if _agree(*outputs) and not any("dropout" in name for name in recorded.names):
        return
    raise UnsupportedError(
        "a network in which only dropout layers (nn.Dropout and its variants) are random in train mode",
        received=f"random calls outside of them, which would stay off: {', '.join(recorded.names) or 'not of torch'}",
        remedy="nn.Dropout modules in place of torch.nn.functional.dropout; a rate of 0 for what should stay off, such "
        "as stochastic depth or dropout of attention weights; or DeepEnsemble, or SWAG.",
    )


def _outputs(network: Network, x: PyTree, seed: int, recorded: _RandomCalls) -> Tensor | None:
    """Outputs (B, C) at a seed; None if the forward fails in train mode, as one that then needs labels does."""
    with torch.no_grad(), seeded_random_state(seed), preserved_tensors(network.module), recorded:
        try:
            return network.functional_outputs(network.params, x)
        except FAILURES as error:
            if is_final_error(error):
                raise
            return None


def _agree(first: Tensor | None, second: Tensor | None) -> bool:
    """Whether outputs are the same up to the round-off of kernels that add in any order."""
    if first is None or second is None or first.shape != second.shape:
        return True
    tolerance = torch.finfo(first.dtype).eps ** 0.75 * float(first.abs().nan_to_num().max()) if len(first) else 0.0
    return torch.allclose(first, second, rtol=0, atol=tolerance, equal_nan=True)


class _RandomCalls(TorchFunctionMode):
    """Records the names of the functions of torch that draw random numbers, each once, in order.

    Attention and recurrent layers draw the same numbers in every call, so that they change no output.
    """

    def __init__(self, x: PyTree) -> None:
        super().__init__()
        self.names: list[str] = []
        self._devices = {tensor.device for tensor in tensors_of(x) if tensor.device.type == "cuda"}

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        name = getattr(func, "__name__", str(func))
        if name in _STAYS_OFF:
            with seeded_random_state(0):
                return func(*args, **(kwargs or {}))
        before = self._states()
        result = func(*args, **(kwargs or {}))
        if name not in self.names and not all(map(torch.equal, before, self._states())):
            self.names.append(name)
        return result

    def _states(self) -> list[Tensor]:
        """The states of the global generators of the CPU and of the devices of the inputs."""
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._devices)]
