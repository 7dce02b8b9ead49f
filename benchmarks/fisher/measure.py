"""Cost per sample of Kronecker and diagonal fits with many classes, relative to a plain forward and backward pass."""

from __future__ import annotations

import cProfile
import pstats
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bdl_bench.networks.resnet import resnet18
from benchmarks.fresh import in_fresh_process
from benchmarks.records import Measured
from estimators import LinearizedLaplace
from estimators.curvature.builders import BUILDERS, GGNOptions
from estimators.curvature.fisher import Fisher
from estimators.errors import EstimatorError
from estimators.runtime.pass_counter import SELF_CHECK

__all__ = ["CASES", "Case", "measure_fisher"]

N_CLASSES, VOCABULARY, TOKENS = 1000, 50_000, 16


class TokenModel(nn.Module):
    """A causal transformer of one block with a vocabulary of 50,000 tokens, (B, T) -> (B, T, V)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(VOCABULARY, width), nn.Parameter(torch.randn(TOKENS, width))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token at each position."""
        h = self.embedding(tokens) + self.position
        mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool, device=h.device).triu(1)
        a = self.first(h)
        h = h + self.attention(a, a, a, attn_mask=mask, need_weights=False)[0]
        logits: Tensor = self.head(h + self.feed_forward(self.second(h)))
        return logits


@dataclass(frozen=True)
class Case:
    """A network with its data, and the options of the fit.

    Attributes:
        network: its name in the table.
        make: returns the network.
        rows: n -> n inputs and targets.
        likelihood: the likelihood.
        options: options of `LinearizedLaplace`.
        n_data: number of rows.
        batch_size: rows per batch of the fit.
        plain_batch_size: rows per batch of the plain passes; larger than that of the fit if few rows are fitted.
    """

    network: str
    make: Callable[[], nn.Module]
    rows: Callable[[int], tuple[Tensor, Tensor]]
    likelihood: str
    options: dict[str, Any]
    n_data: int
    batch_size: int
    plain_batch_size: int


def _images(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, 32, 32), torch.randint(0, N_CLASSES, (n,))


def _texts(n: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, VOCABULARY, (n, TOKENS))
    return tokens, tokens


def _resnet(n_data: int = 512, batch_size: int = 128, **options: Any) -> Case:  # noqa: ANN401
    name = f"ResNet-18, C = {N_CLASSES:,}"
    return Case(name, lambda: resnet18(N_CLASSES), _images, "classification", options, n_data, batch_size, 128)


def _tokens(**options: Any) -> Case:  # noqa: ANN401
    return Case(f"transformer, V = {VOCABULARY:,}", TokenModel, _texts, "causal_lm", options, 16, 8, 8)


CASES: dict[str, Case] = {
    "fisher-resnet18-kron-mc-reduce": _resnet(hessian_structure="kron", fisher="mc", kfac_approx="reduce"),
    "fisher-resnet18-kron-mc-reduce-2048": _resnet(2048, hessian_structure="kron", fisher="mc", kfac_approx="reduce"),
    "fisher-resnet18-kron-mc": _resnet(hessian_structure="kron", fisher="mc"),
    "fisher-resnet18-kron-empirical-reduce": _resnet(
        hessian_structure="kron", fisher="empirical", kfac_approx="reduce"
    ),
    "fisher-resnet18-diag-mc": _resnet(hessian_structure="diag", fisher="mc"),
    "fisher-resnet18-kron-exact-reduce": _resnet(2, 2, hessian_structure="kron", kfac_approx="reduce"),
    "fisher-tokens-kron-mc": _tokens(hessian_structure="kron", fisher="mc"),
    "fisher-tokens-diag-mc": _tokens(hessian_structure="diag", fisher="mc"),
}


def measure_fisher(name: str) -> Measured:
    """Return seconds and passes per sample of a fit, seconds of a plain pass per sample, and the peak memory."""
    try:
        times, _ = in_fresh_process(_times, name)
        _, peak = in_fresh_process(_fit_once, name)
    except EstimatorError as error:
        return {"network": CASES[name].network, "failed": f"{type(error).__name__}: {error.received}"}
    return {**times, "peak": peak}


def _loader(case: Case, n: int, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    x, y = case.rows(n)
    return list(zip(x.split(batch_size), y.split(batch_size), strict=True))


def _times(name: str) -> Measured:
    case = CASES[name]
    torch.manual_seed(0)
    model, loader = case.make().eval(), _loader(case, case.n_data, case.batch_size)
    n_plain = max(case.n_data, case.plain_batch_size)
    plain = _loader(case, n_plain, case.plain_batch_size)
    estimator = LinearizedLaplace(model, case.likelihood, **case.options)
    estimator.fit([(x[:1], y[:1]) for x, y in loader[:1]])  # imports what torch.func needs
    _plain_pass(model, plain[:1])
    before = _seconds(lambda: _plain_pass(model, plain))
    fit, decompositions = _without_decompositions(lambda: estimator.fit(loader))
    objective = estimator.objective_.centred(curvature="ggn")
    objective.network.check.enabled = False
    build = BUILDERS["ggn", case.options["hessian_structure"], "eigen"]
    fisher = Fisher(case.options.get("fisher", "exact"))
    options = GGNOptions(fisher, case.options.get("kfac_approx", "expand"))
    curvature, _ = _without_decompositions(lambda: build(objective, options))
    after = _seconds(lambda: _plain_pass(model, plain))
    passes = estimator.fit_report_.passes
    return {
        "network": case.network,
        "options": case.options,
        "n_data": case.n_data,
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "plain_seconds": (before + after) / 2 * case.n_data / n_plain,
        "fit_seconds": fit,
        "curvature_seconds": curvature,
        "decomposition_seconds": decompositions,
        "passes": sum(passes.values()),
        "passes_without_check": sum(cost for phase, cost in passes.items() if phase != SELF_CHECK),
    }


def _without_decompositions(step: Callable[[], object]) -> tuple[float, float]:
    """Return the processor seconds of one call without its eigendecompositions, and those of these."""
    profile = cProfile.Profile(time.process_time, builtins=False)
    seconds = _seconds(lambda: profile.runcall(step))
    decompositions = sum(
        cumulative
        for (file, _, function), (_, _, _, cumulative, _) in pstats.Stats(profile).stats.items()  # type: ignore[attr-defined]
        if function == "eigen" and file.endswith("second_moment.py")
    )
    return seconds - decompositions, decompositions


def _seconds(step: Callable[[], object]) -> float:
    """Return the processor seconds of one call, which other programs disturb less than the time of day."""
    started = time.process_time()
    step()
    return time.process_time() - started


def _plain_pass(model: nn.Module, loader: list[tuple[Tensor, Tensor]]) -> None:
    """Run one forward and backward pass over all rows, as a training epoch does."""
    for x, _ in loader:
        f = model(x)
        f.logsumexp(-1).sum().backward()
        model.zero_grad(set_to_none=True)


def _fit_once(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    LinearizedLaplace(case.make().eval(), case.likelihood, **case.options).fit(
        _loader(case, case.n_data, case.batch_size)
    )
