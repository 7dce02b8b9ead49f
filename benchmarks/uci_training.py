"""What moves the errors of ensembles and of dropout in the UCI comparison.

`python -m benchmarks.uci_training --data-dir DIR --out FILE` prints the tables of docs/reproduction.md.

Ensembles of five networks are trained on all published splits at once, by recipes that differ in one choice at a time:
the learning rate, whether the validation rows are trained on, the prior, whether the variance is one number or an
output of the network, and adversarial examples. The learning rate of the tasks `uci-<set>` is that with the smallest
error on the validation rows, which no network of the first rows of the table has seen. Dropout is one network per
split, by the same data, with a mask on the hidden units and, as Gal and Ghahramani have it, another on the inputs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bdl_bench.data.folder import VARIABLE
from bdl_bench.data.uci import canonical_split
from bdl_bench.reproduce.published import UCI
from bdl_bench.tasks.split import split_validation, standardised
from bdl_bench.tasks.uci import UCI_SETS, UciSet
from benchmarks.markdown import table as markdown

__all__ = ["VARIANTS", "Variant", "main", "measure", "table"]

MEMBERS = 5
"""Networks of an ensemble, as in Lakshminarayanan et al. (2017)."""
MASKS = 100
"""Dropout masks per prediction."""
DROPOUT_RATES = (0.005, 0.01, 0.025, 0.05, 0.1)
"""Rates of dropout: those of Gal and Ghahramani (2016) are 0.005, 0.01, 0.05 and 0.1."""
RATES = (0.1, 0.03, 0.01, 0.003)
"""Learning rates of Adam for ensembles; 0.1 is that of Lakshminarayanan et al. (2017)."""
ADVERSARIAL_STEP = 0.01
"""Of the range of each input, as in Lakshminarayanan et al. (2017)."""
Row = dict[str, Any]
Drop = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Variant:
    """A way to train the ensemble.

    Args:
        lr: constant learning rate of Adam.
        all_rows: whether the validation rows are trained on.
        prior_precision: δ of the penalty δ/2 ‖θ‖² on the summed loss.
        own_variance: whether the network predicts the variance of each row; else it is one number per split, the mean
            squared error of the validation rows (training rows if these are trained on).
        adversarial: whether the loss at adversarial examples is added.
        dropout: rate of the masks on hidden units; 0 for an ensemble without masks.
        dropped_inputs: whether inputs have masks of the same rate.
        epochs: in multiples of those of the set.
    """

    lr: float = 0.01
    all_rows: bool = False
    prior_precision: float = 1.0
    own_variance: bool = False
    adversarial: bool = False
    dropout: float = 0.0
    dropped_inputs: bool = False
    epochs: int = 1

    @property
    def column(self) -> str:
        """The published column of the same method."""
        return "dropout" if self.dropout else "ensemble"

    @property
    def members(self) -> int:
        """Networks per split."""
        return 1 if self.dropout else MEMBERS


VARIANTS: Mapping[str, Variant] = {
    **{f"Adam at {lr:g}": Variant(lr) for lr in RATES},
    "0.01, all training rows": Variant(all_rows=True),
    "0.01, all rows, no prior": Variant(all_rows=True, prior_precision=0.0),
    "0.01, all rows, no prior, own variance": Variant(all_rows=True, prior_precision=0.0, own_variance=True),
    "0.01, as published": Variant(all_rows=True, prior_precision=0.0, own_variance=True, adversarial=True),
    "0.1, as published": Variant(0.1, all_rows=True, prior_precision=0.0, own_variance=True, adversarial=True),
    **{f"dropout {rate:g}, Adam at 0.03": Variant(0.03, dropout=rate) for rate in DROPOUT_RATES},
    **{
        f"dropout {rate:g}, 0.03, inputs too": Variant(0.03, dropout=rate, dropped_inputs=True) for rate in (0.01, 0.05)
    },
    **{f"dropout {rate:g}, Adam at 0.01": Variant(0.01, dropout=rate) for rate in (0.005, 0.05)},
    **{
        f"dropout {rate:g}, 0.001, ten times the epochs": Variant(0.001, dropout=rate, epochs=10)
        for rate in (0.005, 0.05)
    },
    "dropout 0.005, 0.03, all training rows": Variant(0.03, dropout=0.005, all_rows=True),
}


@dataclass(frozen=True)
class _Data:
    """Standardised rows of S splits: train (S, N, ·), validation and test; and the scale of each target (S,)."""

    parts: Mapping[str, tuple[Tensor, Tensor]]
    scale: Tensor


class _Networks(nn.Module):
    """E networks with one hidden ReLU layer, by products of stacks of matrices; the default initialisation of torch."""

    def __init__(self, number: int, inputs: int, hidden: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        shapes = ((inputs, hidden), (hidden, outputs))
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in shapes:
            for found, shape in ((self.weights, (fan_in, fan_out)), (self.biases, (1, fan_out))):
                bound = 1 / math.sqrt(fan_in)
                found.append(nn.Parameter((2 * torch.rand(number, *shape, generator=generator) - 1) * bound))

    def forward(self, x: Tensor, drop: Drop = lambda x: x, drop_inputs: Drop = lambda x: x) -> Tensor:
        """Map inputs (E, B, D) to outputs (E, B, C); `drop` applies a mask to hidden units, `drop_inputs` to inputs."""
        hidden = torch.baddbmm(self.biases[0], drop_inputs(x), self.weights[0]).relu()
        return torch.baddbmm(self.biases[1], drop(hidden), self.weights[1])


def measure(uci: UciSet, variant: Variant, *, seed: int = 0) -> Row:
    """Return the errors of ensembles on every published split of a set, in the unit of the target.

    Args:
        uci: the set.
        variant: how the networks are trained.
        seed: of initialisations and orders of the rows.

    Returns:
        "rmse" and "nll" of the test rows by split, and "validation" in standard deviations of the target, which means
        nothing if `variant.all_rows`.
    """
    data = _stacked(uci, all_rows=variant.all_rows)
    generator = torch.Generator().manual_seed(seed)
    networks = _trained(data, uci, variant, generator)
    with torch.no_grad():
        predictions = {name: _moments(networks, x, variant, generator) for name, (x, _) in data.parts.items()}
    residual = {name: data.parts[name][1] - mean for name, (mean, _) in predictions.items()}
    error = {name: found.square().mean((1, 2)).sqrt() for name, found in residual.items()}
    variance = predictions["test"][1]
    if not variant.own_variance:
        variance = variance + error["train" if variant.all_rows else "validation"].square()[:, None, None]
    nll = 0.5 * (math.log(2 * math.pi) + variance.log() + residual["test"].square() / variance)
    return {
        "set": uci.name,
        "rmse": (error["test"] * data.scale).tolist(),
        "nll": (nll.mean((1, 2)) + data.scale.log()).tolist(),
        "validation": error["validation"].tolist(),
    }


def _stacked(uci: UciSet, *, all_rows: bool) -> _Data:
    found: dict[str, list[tuple[Tensor, Tensor]]] = {"train": [], "validation": [], "test": []}
    scales = []
    for number in range(uci.n_splits):
        split = canonical_split(uci.folder, number)
        kept, held_out = split_validation(len(split.train), 0.1, number)
        train = split.train if all_rows else split.train[kept]
        x = standardised(split.columns.inputs, train).float()
        y = standardised(split.columns.target, train).float()
        for name, rows in (("train", train), ("validation", split.train[held_out]), ("test", split.test)):
            found[name].append((x[rows], y[rows]))
        scales.append(split.columns.target[train].std().float())
    stacked = {name: tuple(map(torch.stack, zip(*parts, strict=True))) for name, parts in found.items()}
    return _Data({name: (x, y) for name, (x, y) in stacked.items()}, torch.stack(scales))


def _trained(data: _Data, uci: UciSet, variant: Variant, generator: torch.Generator) -> _Networks:
    x, y = data.parts["train"]
    splits, rows, inputs = x.shape
    number = splits * variant.members
    networks = _Networks(number, inputs, uci.hidden, 1 + variant.own_variance, generator)
    optimizer = torch.optim.Adam(networks.parameters(), lr=variant.lr)
    split = torch.arange(splits).repeat_interleave(variant.members)[:, None]
    drop, drop_inputs = _masks(variant, generator)
    step = ADVERSARIAL_STEP * (x.amax(1) - x.amin(1))[split[:, 0], None]
    decay = variant.prior_precision / (2 * rows)
    for _ in range(uci.epochs * variant.epochs):
        order = torch.rand(number, rows, generator=generator).argsort(1)
        for batch in order.split(100, dim=1):
            inputs_here, targets = x[split, batch].requires_grad_(variant.adversarial), y[split, batch]
            loss = _loss(networks(inputs_here, drop, drop_inputs), targets, uci.sigma_noise)
            if variant.adversarial:
                (slope,) = torch.autograd.grad(loss, inputs_here, retain_graph=True)
                loss = loss + _loss(networks((inputs_here + step * slope.sign()).detach()), targets, uci.sigma_noise)
            for parameter in networks.parameters() if decay else ():
                loss = loss + decay * parameter.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return networks


def _loss(outputs: Tensor, targets: Tensor, sigma_noise: float) -> Tensor:
    """Return the negative log likelihood, mean over rows and summed over networks, which are independent."""
    if outputs.shape[-1] == 1:
        return ((outputs - targets).square() / (2 * sigma_noise**2)).mean((1, 2)).sum()
    mean, variance = _mean_and_variance(outputs)
    return (0.5 * variance.log() + (mean - targets).square() / (2 * variance)).mean((1, 2)).sum()


def _mean_and_variance(outputs: Tensor) -> tuple[Tensor, Tensor]:
    return outputs[..., :1], nn.functional.softplus(outputs[..., 1:]) + 1e-6


def _masks(variant: Variant, generator: torch.Generator) -> tuple[Drop, Drop]:
    """Return the functions that apply new masks to hidden units and to inputs."""

    def drop(values: Tensor) -> Tensor:
        return values * (torch.rand(values.shape, generator=generator) >= variant.dropout) / (1 - variant.dropout)

    def keep(values: Tensor) -> Tensor:
        return values

    return drop if variant.dropout else keep, drop if variant.dropped_inputs else keep


def _moments(networks: _Networks, x: Tensor, variant: Variant, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return mean and variance (S, N, 1) of the mixture of members or masks; without σ² if it is one number."""
    if variant.dropout:
        masks = _masks(variant, generator)
        outputs = torch.stack([networks(x, *masks) for _ in range(MASKS)], dim=1)
    else:
        outputs = networks(x.repeat_interleave(MEMBERS, 0)).unflatten(0, (-1, MEMBERS))
    mean, own = _mean_and_variance(outputs) if variant.own_variance else (outputs, torch.zeros(()))
    return mean.mean(1), mean.var(1, correction=0) + (own.mean(1) if variant.own_variance else own)


def table(rows: Mapping[str, Mapping[str, Row]], score: str) -> str:
    """Return the Markdown table of variants and sets: means over splits with the standard deviation over splits.

    Args:
        rows: results of `measure` by variant and set.
        score: "rmse", "nll" or "validation".
    """
    sets = [uci.name for uci in UCI_SETS if any(uci.name in found for found in rows.values())]
    lines = []
    for column in ("ensemble", "dropout"):
        if score != "validation":
            lines.append([f"published {column}", *(str(UCI[score.upper()][name][column]) for name in sets)])
        for variant, found in rows.items():
            if VARIANTS[variant].column == column and not (score == "validation" and VARIANTS[variant].all_rows):
                entries = (_entry(found[name][score], name, score, column) if name in found else "–" for name in sets)
                lines.append([variant, *entries])
    return markdown(["training", *sets], lines)


def _entry(values: Sequence[float], name: str, score: str, column: str) -> str:
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1))
    if score == "validation":
        return f"{mean:.4f}"
    position = UCI[score.upper()][name][column].position(mean)
    return f"{mean:.3g} ± {spread:.2g}" + {"inside": "", "below": " ↓", "above": " ↑"}[position]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train all variants, write the results to a file and print the tables.

    Args:
        arguments: the words of the command line; None: those of this process.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.uci_training", description=__doc__)
    parser.add_argument("--data-dir", required=True, help="folder of the eight sets")
    parser.add_argument("--sets", nargs="+", default=[uci.name for uci in UCI_SETS], help="names of sets")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), help="rows of the tables")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write; what it has is kept")
    options = parser.parse_args(arguments)
    os.environ[VARIABLE] = options.data_dir
    rows: dict[str, dict[str, Row]] = json.loads(options.out.read_text()) if options.out.exists() else {}
    for uci in UCI_SETS:
        for name in options.variants:
            if uci.name in options.sets and uci.name not in rows.setdefault(name, {}):
                rows[name][uci.name] = measure(uci, VARIANTS[name])
                options.out.write_text(json.dumps(rows))
                print(uci.name, name, f"{np.mean(rows[name][uci.name]['rmse']):.4g}", flush=True)
    for score in ("rmse", "nll", "validation"):
        print(f"\n{score}\n\n{table(rows, score)}")


if __name__ == "__main__":
    main()
