"""LoRA adapters in a pretrained network whose other weights are frozen."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from bdl_bench.data.pretrained import package

__all__ = ["with_adapters"]


def with_adapters(network: nn.Module, targets: Sequence[str], *, rank: int) -> nn.Module:
    """Return the network, changed in place: its weights are frozen, and the linear layers in `targets` have adapters.

    W x -> W x + 2 B A x with A (rank, in) random and B (out, rank) zero at initialisation (Hu et al. 2022).
    """
    peft = package("peft", extra="text")
    network.requires_grad_(False)
    options = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), lora_dropout=0.0)
    adapted: nn.Module = peft.inject_adapter_in_model(options, network)
    return adapted
