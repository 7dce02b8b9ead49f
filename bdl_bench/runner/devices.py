"""Whether a device is here, before anything is computed on it."""

from __future__ import annotations

import torch

from estimators.errors import OptionError

__all__ = ["check_device"]


def check_device(name: str, *, elsewhere: bool = False) -> None:
    """Raise if a tensor cannot be made on a device.

    Args:
        name: such as "cpu" or "cuda:1".
        elsewhere: whether other machines run the jobs, so that only the name of a GPU is checked.

    Raises:
        OptionError: for an unknown name and a device that is not here.
    """
    try:
        device = torch.device(name)
        if not (elsewhere and device.type == "cuda"):
            torch.zeros(1, device=device)
        elif device.index:
            raise RuntimeError("ray gives each job one GPU, whose number is 0 there")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise OptionError(
            "a device that is here", received=f"{name!r}: {reason}", remedy="--device cpu or cuda."
        ) from error
