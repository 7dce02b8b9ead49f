"""Quality by cost: the scores, every method on a small problem, and the page."""

import pytest
import torch
from torch import nn

from bdl_bench.problem import Problem
from benchmarks.quality import measure, page
from benchmarks.quality.networks import NETWORKS
from estimators.runtime.rng import preserved_random_state
from estimators.training import Recipe, train_map


def make(dropout=0.0):
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3)).double()


def small(network, delta, seed, *, dropout=0.0):  # noqa: ARG001
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    batches = [(x[i : i + 20], (x[i : i + 20, 0] > 0).long()) for i in (0, 20, 40)]
    with preserved_random_state():
        torch.manual_seed(0)
        model = make(dropout)
        train_map(model, "classification", batches, prior_precision=delta, recipe=Recipe(epochs=15))
    how = {"recipe": Recipe(epochs=100), "make_model": make}
    return Problem(model, "classification", batches, batches, batches, prior_precision=delta, **how)


def test_scores_are_of_the_ratio_and_of_the_order():
    exact = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    perfect = measure.scores(exact, exact)
    assert perfect == {"spearman": pytest.approx(1), "relative_rmse": 0.0, "mean_ratio": 1.0}
    off = measure.scores(2 * exact.flip(0), exact)  # ratios 6, 4, 2/3, 1
    assert off["mean_ratio"] == pytest.approx(2)
    assert off["relative_rmse"] == pytest.approx(((25 + 9 + 1 / 9 + 0) / 4) ** 0.5)
    assert off["spearman"] == pytest.approx(-0.6)  # ranks 3, 4, 1, 2 beside 1, 2, 3, 4


def test_every_method_is_measured_and_has_a_line(monkeypatch):
    monkeypatch.setattr(measure, "trained_problem", small)
    monkeypatch.setattr(measure, "EPOCHS", {"mlp": (2,)})
    monkeypatch.setattr(measure, "ITERATIONS", {"mlp": (1, 8)})
    monkeypatch.setattr(measure, "MEMBERS", {"mlp": (2,)})
    rows = {page.name_of("mlp", 1.0, seed): measure.measure_quality("mlp", 1.0, seed) for seed in (0, 1)}
    points = rows["quality-mlp-1-0"]["points"]
    by_method = {point["method"]: point for point in points}
    assert by_method["exact draws, K = 64"]["relative_rmse"] < 0.35
    assert by_method["LinearResponse, bounds"]["relative_rmse"] < 0.01  # eight iterations exhaust so small a space
    best = by_method["last layer, times its best constant"]
    assert best["constant"] > 1  # it leaves out the rest of the network's variance
    assert by_method["FineTune"]["passes"] == pytest.approx(16 * by_method["FineTune"]["passes_per_draw"])
    text = page.to_markdown(rows)
    assert "## MLP, 51 parameters, δ = 1, 2 seeds" in text
    assert text.count("\n| ") == 2 + len(points)
    assert "deep ensemble, 2 members | 200 | – | 2.00" in text


@pytest.mark.parametrize("name", NETWORKS)
def test_the_networks_take_digits(name):
    make, _ = NETWORKS[name]
    model = make(0.1).eval()
    assert model(torch.rand(3, 64, dtype=torch.float64)).shape == (3, 10)
    assert sum(p.numel() for p in model.parameters()) == {"mlp": 2410, "cnn": 38378}[name]
