"""R-hat and effective sample sizes: compared with arviz-stats, with formulas, and where they must fail."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from estimators.sampling.convergence import _normal_scores, bulk_ess, e_bfmi, split_r_hat
from estimators.sampling.step_size import DualAveraging

KINDS = {"autocorrelated": 0.9, "independent": 0.0, "antithetic": -0.6, "ties": 0.5, "random walk": 1.0}


def chains(kind, k=4, s=101, q=3):
    """K autoregressive chains of Q quantities; ties as rejected trajectories make them."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(k, s, q))
    for t in range(1, s):
        x[:, t] += KINDS[kind] * x[:, t - 1]
    return torch.from_numpy(np.round(x) if kind == "ties" else x)


def plain_r_hat(x):
    """R-hat of one quantity (K, S) as the paper has it, in numpy and scipy."""
    half = x.shape[1] // 2
    split = np.concatenate([x[:, :half], x[:, -half:]])

    def of(values):
        z = stats.norm.ppf((stats.rankdata(values).reshape(values.shape) - 3 / 8) / (values.size + 1 / 4))
        within, between = z.var(1, ddof=1).mean(), z.mean(1).var(ddof=1)
        return math.sqrt((within * (half - 1) / half + between) / within)

    return max(of(split), of(np.abs(split - np.median(split))))


@pytest.mark.parametrize("kind", KINDS)
def test_r_hat_is_that_of_the_paper(kind):
    x = chains(kind)
    expected = [plain_r_hat(x[..., i].numpy()) for i in range(x.shape[-1])]
    np.testing.assert_allclose(split_r_hat(x).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(4, 101), (2, 50), (16, 20)])
def test_values_are_those_of_arviz(kind, shape):
    base = pytest.importorskip("arviz_stats.base", reason='needs the extra: pip install "bdl-bench[reference]"')
    x = chains(kind, *shape)
    axes = {"chain_axis": 0, "draw_axis": 1}
    np.testing.assert_allclose(split_r_hat(x), base.array_stats.rhat(x.numpy(), **axes), rtol=1e-10)
    np.testing.assert_allclose(bulk_ess(x), base.array_stats.ess(x.numpy(), method="bulk", **axes), rtol=1e-10)
    np.testing.assert_allclose(e_bfmi(x[..., 0]), base.array_stats.bfmi(x[..., 0].numpy(), **axes), rtol=1e-10)


@pytest.mark.parametrize("coefficient", [0.0, 0.5, 0.8])
def test_the_effective_sample_size_of_an_autoregression_is_its_closed_form(coefficient):
    rng, (k, s, q) = np.random.default_rng(3), (4, 4000, 20)
    x = rng.normal(size=(k, s, q))
    x[:, 0] /= math.sqrt(1 - coefficient**2)
    for t in range(1, s):
        x[:, t] += coefficient * x[:, t - 1]
    expected = k * s * (1 - coefficient) / (1 + coefficient)  # 1/τ = (1 − a)/(1 + a)
    assert float(bulk_ess(torch.from_numpy(x)).mean()) == pytest.approx(expected, rel=0.05)


def test_r_hat_sees_chains_that_differ_in_location_spread_or_time():
    same = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 400, 1)))
    shifted, spread, drifting = same.clone(), same.clone(), same.clone()
    shifted[:2] += 1
    spread[:2] *= 4
    drifting += torch.linspace(-1, 1, 400)[None, :, None]
    assert float(split_r_hat(same)) < 1.01
    for wrong in (shifted, spread, drifting):
        assert float(split_r_hat(wrong)) > 1.1


def test_ranks_are_finite_for_heavy_tails():
    draws = torch.from_numpy(np.random.default_rng(0).standard_cauchy(size=(4, 1000, 1)))
    assert float(split_r_hat(draws)) < 1.01
    assert float(bulk_ess(draws)) == pytest.approx(4000, rel=0.15)


@pytest.mark.parametrize("draws", [torch.randn(4, 3, 2), torch.ones(4, 50, 2)], ids=["three draws", "no spread"])
def test_too_little_to_judge_is_not_a_number(draws):
    assert bool(split_r_hat(draws).isnan().all())
    assert bool(bulk_ess(draws).isnan().all())


def test_dual_averaging_finds_the_step_size_of_an_acceptance():
    """With acceptance exp(−ε), the target .8 is at ε = −log .8."""
    rng, adapted = np.random.default_rng(0), DualAveraging(5.0, target=0.8)
    for _ in range(2000):
        adapted.update(min(1.0, math.exp(-adapted.step_size) + 0.05 * rng.normal()))
    assert adapted.average == pytest.approx(-math.log(0.8), rel=0.05)


def test_equal_infinities_have_the_average_of_their_ranks():
    values = torch.tensor([1, math.inf, math.inf, -math.inf, 0, -math.inf], dtype=torch.float64)
    expected = stats.norm.ppf((stats.rankdata(values.numpy()) - 3 / 8) / (len(values) + 1 / 4))
    np.testing.assert_allclose(_normal_scores(values.reshape(2, 3, 1)).flatten().numpy(), expected, rtol=1e-12)
