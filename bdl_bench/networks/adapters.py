"""LoRA adapters in a pretrained network: they alone, and what is named beside them, are trained."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from bdl_bench.data.packages import package

__all__ = ["with_adapters"]


def with_adapters(network: nn.Module, targets: Sequence[str], *, rank: int) -> nn.Module:
    """The network itself, all weights frozen, with adapters of this rank on the linear layers whose names end so.

    W x -> W x + 2 B A x, A (rank, in) drawn, B (out, rank) zero (Hu et al. 2022).
    """
    peft = package("peft", extra="text")
    network.requires_grad_(False)
    options = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), lora_dropout=0.0)
    adapted: nn.Module = peft.inject_adapter_in_model(options, network)
    return adapted
