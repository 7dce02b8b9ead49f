"""Simulation-based calibration: uniform for an exact posterior, not for a wrong one; seeds, resuming, the command."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from typer.testing import CliRunner

from bdl_bench.cli import app
from bdl_bench.verify.sbc import PresetMethod, Ranks, SbcCase, SbcSummary, run_sbc, small_cases, write_sbc
from bdl_bench.verify.sbc import run as sbc_run
from bdl_bench.verify.sbc.ranks import rank_among
from bdl_bench.verify.sbc.summary import simultaneous_band
from estimators import Bernoulli, Gaussian
from estimators.errors import ModelError, OptionError, UnsupportedError
from estimators.estimator.members import MembersEstimator
from estimators.runtime.rng import member_seeds
from estimators.training import Recipe

SIGMA, DELTA = torch.tensor([0.6, 0.9], dtype=torch.float64), 1.7


def linear_case(likelihood=None):
    """A linear network with two outputs and 7 rows, whose posterior is normal and known."""
    generator = torch.Generator().manual_seed(5)
    inputs, queries = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (7, 4))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(3, 2).double().eval()
    return SbcCase(model, likelihood or Gaussian(SIGMA), DELTA, inputs, queries, Recipe(epochs=1, batch_size=None))


def conjugate_ranks(simulation):
    """Ranks under the posterior of Bayesian linear regression, derived anew from its normal equations."""
    phi, star = (torch.cat([part, part.new_ones(len(part), 1)], 1) for part in (simulation.inputs, simulation.queries))
    ranks = []
    for c in range(2):
        a = phi.T @ phi / SIGMA[c] ** 2 + DELTA * torch.eye(4, dtype=phi.dtype)
        mean = star @ torch.linalg.solve(a, phi.T @ simulation.targets[:, c] / SIGMA[c] ** 2)
        variance = (star @ torch.linalg.inv(a) * star).sum(1)
        ranks.append(stats.norm.cdf(simulation.truth[:, c], mean, variance.sqrt()))
    return np.stack(ranks, 1)


class Prior(MembersEstimator):
    """99 draws from the prior, which ignore the data."""

    def _fit(self, objective, *, progress_bar):  # noqa: ARG002
        generator = torch.Generator().manual_seed(self.seed)
        z = torch.randn(99, len(objective.theta), generator=generator, dtype=torch.float64)
        self.draws_ = z / objective.prior.precision.sqrt()

    def _members(self, x):
        return torch.stack([self.network_(theta, x) for theta in self.draws_]).detach()


def prior(problem, seed):
    made = Prior(problem.model, problem.likelihood, prior_precision=DELTA)
    made.seed = seed
    return made


N = 110


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    methods = {"laplace": PresetMethod("laplace")}
    return run_sbc({"linear": linear_case()}, methods, out=tmp_path_factory.mktemp("sbc"), n_replications=N)


def test_laplace_is_exact_for_a_linear_network_and_its_ranks_are_uniform(linear):
    summary = linear.summary("linear", "laplace")
    assert summary.n == N
    for r, seed in enumerate(member_seeds(0, 5)):
        expected = conjugate_ranks(linear_case().simulate(seed))
        np.testing.assert_allclose(summary.every_f[r], expected, atol=1e-3)  # the network is converged to 1e-3
    assert summary.is_uniform
    assert abs(summary.coverage(0.9)[0] - 0.9) < 3 * math.sqrt(0.9 * 0.1 / N)
    assert summary.spread == pytest.approx(1, abs=0.1)
    assert summary.verdict == "uniform"


@pytest.mark.parametrize(("scale", "verdict"), [(2.0, "too wide"), (0.5, "too narrow")])
def test_a_posterior_of_another_width_is_detected(linear, scale, verdict):
    exact = stats.norm.ppf(linear.summary("linear", "laplace").every_f)
    found = [Ranks(torch.from_numpy(stats.norm.cdf(z / scale)), None, "normal") for z in exact]
    summary = SbcSummary.of("linear", "scaled", found, member_seeds(0, N), [], 0.0)
    assert summary.ks[1] < 0.01
    covered = 2 * stats.norm.cdf(1.645 * scale) - 1  # .999 and .589
    assert summary.coverage(0.9)[0] == pytest.approx(covered, abs=3 * math.sqrt(0.25 / N))
    assert summary.spread == pytest.approx(1 / scale, rel=0.12)
    assert verdict in summary.verdict


def test_the_prior_has_uniform_ranks_of_f_and_the_log_likelihood_detects_it(tmp_path):
    result = run_sbc({"linear": linear_case()}, {"prior": prior}, out=tmp_path, n_replications=40)
    summary = result.summary("linear", "prior")
    assert summary.ranked_by == "draws"
    assert summary.ks[1] > 0.01
    assert summary.ks_log_likelihood[1] < 1e-6
    assert summary.verdict == "log-likelihood not uniform"


def test_ranks_are_uniform_among_exchangeable_draws_and_with_ties():
    generator = torch.Generator().manual_seed(0)
    for make in (torch.randn, lambda *shape, **o: torch.randint(3, shape, **o).double()):
        draws, truth = make(9, 4000, generator=generator), make(4000, generator=generator)
        ranks = rank_among(draws.double(), truth.double(), generator).numpy()
        assert stats.kstest(ranks, "uniform").pvalue > 0.01
    draws = torch.arange(4.0).double()[:, None]
    rank = float(rank_among(draws, torch.tensor([1.5]).double(), generator))
    assert 2 / 5 <= rank <= 3 / 5


def test_the_band_holds_whole_ecdfs_at_its_level():
    z, lower, upper = simultaneous_band(60)
    uniform = np.random.default_rng(1).random((2000, 60))
    ecdf = (uniform[:, :, None] <= z).mean(1) - z
    inside = ((ecdf >= lower - 1e-12) & (ecdf <= upper + 1e-12)).all(1).mean()
    assert 0.93 <= inside <= 0.98
    pointwise = stats.binom.interval(0.95, 60, 0.5)
    assert upper[49] > pointwise[1] / 60 - 0.5


def test_coverage_is_averaged_over_outputs_and_its_error_is_over_replications():
    f = [torch.tensor([[0.5, 0.99]]), torch.tensor([[0.5, 0.5]]), torch.tensor([[0.01, 0.99]])]
    summary = SbcSummary.of("c", "m", [Ranks(part, None, "normal") for part in f], [1, 2, 3], [], 0.0)
    assert summary.coverage(0.9) == pytest.approx((0.5, np.std([0.5, 1, 0], ddof=1) / math.sqrt(3)))
    assert len(summary.f) == 3
    assert math.isnan(summary.ks_log_likelihood[1])


@pytest.mark.parametrize("n", [1, 5, 10, 40])
def test_few_replications_of_an_exact_posterior_are_not_called_too_narrow_or_too_wide(n):
    """All outputs of a replication have one rank, as those of queries near each other: they are covered together."""
    verdicts = []
    for uniform in np.random.default_rng(n).random((300, n)):
        found = [Ranks(torch.full((4, 2), rank).double(), None, "normal") for rank in uniform]
        verdicts.append(SbcSummary.of("c", "m", found, list(range(n)), [], 0.0).verdict)
    assert sum(verdict.startswith("too") for verdict in verdicts) <= 9  # 3 %; before: 55 % of 5 replications


def test_data_are_drawn_from_the_prior_and_the_likelihood():
    case = replace(linear_case(), prior_precision={"weight": 4.0, "bias": 0.25})
    made = [case.simulate(seed) for seed in range(60)]
    f = torch.stack([simulation.truth_at_inputs for simulation in made])
    expected = case.inputs.square().sum(1) / 4 + 1 / 0.25
    assert torch.allclose(f.var(0).mean(1) / expected, torch.ones(7).double(), atol=0.45)
    noise = torch.stack([simulation.targets - simulation.truth_at_inputs for simulation in made])
    assert torch.allclose(noise.flatten(0, 1).std(0), SIGMA, rtol=0.12)
    assert max(simulation.relative_gradient for simulation in made) < 1e-3
    again = case.simulate(7)
    assert torch.equal(again.targets, made[7].targets)
    assert torch.equal(again.problem.model.weight, made[7].problem.model.weight)
    assert not torch.equal(made[8].truth, made[7].truth)


class Frozen(nn.Module):
    """A hidden layer of random features that are not trained, and a random scale in a buffer."""

    def __init__(self):
        super().__init__()
        self.features, self.head = nn.Linear(3, 6).requires_grad_(False), nn.Linear(6, 2)
        self.register_buffer("scale", torch.rand(6), persistent=False)

    def forward(self, x):
        return self.head(self.scale * torch.tanh(self.features(x)))


def test_new_networks_have_the_frozen_weights_and_buffers_of_the_truth():
    case = replace(linear_case(), model=Frozen().eval(), make_model=Frozen)
    kept = {name: t.clone() for name, t in case.model.state_dict().items()}
    simulation = case.simulate(1)
    trained, new = simulation.problem.model, simulation.problem.make_model()
    for network in (trained, new):
        assert network.features.weight.tolist() == case.model.features.weight.double().tolist()
        assert network.features.bias.tolist() == case.model.features.bias.double().tolist()
        assert network.scale.tolist() == case.model.scale.double().tolist()
    phi = case.model.double().scale * torch.tanh(case.model.features(simulation.inputs))
    phi = torch.cat([phi, phi.new_ones(7, 1)], 1)
    for c in range(2):  # the trained network is the posterior mean, whose residuals are those of its own targets
        a = phi.T @ phi / SIGMA[c] ** 2 + DELTA * torch.eye(7).double()
        mean = torch.linalg.solve(a, phi.T @ simulation.targets[:, c] / SIGMA[c] ** 2)
        assert torch.allclose(torch.cat([trained.head.weight[c], trained.head.bias[c, None]]), mean, atol=1e-2)
    assert not torch.equal(new.head.weight, trained.head.weight)
    assert all(torch.equal(case.model.float().state_dict()[name], t) for name, t in kept.items())
    with pytest.raises(ModelError, match="architecture"):
        replace(case, make_model=lambda: nn.Linear(3, 2)).simulate(1)


def test_a_run_that_was_killed_continues_with_the_same_numbers(tmp_path, monkeypatch):
    cases = {"linear": linear_case()}
    methods = {"laplace": PresetMethod("laplace"), "map": PresetMethod("map")}
    whole = run_sbc(cases, methods, out=tmp_path / "whole", n_replications=4)
    written, write = [], sbc_run.write_text

    def interrupted(path, content):
        if path.name != "settings.json":
            written.append(path)
        if len(written) == 4:  # between the two methods of a replication
            raise KeyboardInterrupt
        write(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(sbc_run, "write_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_sbc(cases, methods, out=tmp_path / "killed", n_replications=4)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("0*.json")}
    assert len(kept) == 3
    seen = []
    resumed = run_sbc(
        cases, methods, out=tmp_path / "killed", n_replications=4, listener=lambda *counts: seen.append(counts)
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    for one, other in zip(whole.summaries, resumed.summaries, strict=True):
        np.testing.assert_array_equal(one.every_f, other.every_f)
        np.testing.assert_array_equal(one.log_likelihood, other.log_likelihood)
    extended = run_sbc(cases, methods, out=tmp_path / "killed", n_replications=5)
    np.testing.assert_array_equal(extended.summaries[0].f[:4], whole.summaries[0].f)


def test_records_of_another_case_or_seed_are_rejected(tmp_path):
    methods = {"laplace": PresetMethod("laplace")}
    run_sbc({"linear": linear_case()}, methods, out=tmp_path, n_replications=1)
    for changed, seed in ((replace(linear_case(), prior_precision=2.0), 0), (linear_case(), 1)):
        with pytest.raises(OptionError, match="another --out"):
            run_sbc({"linear": changed}, methods, out=tmp_path, n_replications=1, seed=seed)


def linear_network(bias_at_start):
    made = nn.Linear(3, 2).double()
    nn.init.constant_(made.bias, bias_at_start)
    return made


def test_records_of_another_make_model_are_rejected(tmp_path):
    """Initial weights come from it, so that its code and its options belong to the case."""
    methods = {"laplace": PresetMethod("laplace")}
    case = replace(linear_case(), make_model=partial(linear_network, 0.0))
    assert replace(case, make_model=partial(linear_network, 0.0)).checksum() == case.checksum()
    run_sbc({"linear": case}, methods, out=tmp_path, n_replications=1)
    for changed in (partial(linear_network, 1.0), lambda: nn.Linear(3, 2).double(), None):
        with pytest.raises(OptionError, match="another --out"):
            run_sbc({"linear": replace(case, make_model=changed)}, methods, out=tmp_path, n_replications=1)


@pytest.mark.verification
def test_several_processes_write_the_same_records(tmp_path):
    case = small_cases()["classification"]
    case = replace(case, recipe=Recipe(epochs=2, batch_size=None))
    methods = {"laplace": PresetMethod("laplace")}
    alone, together = (
        run_sbc({"c": case}, methods, out=tmp_path / str(jobs), n_replications=2, jobs=jobs) for jobs in (1, 2)
    )
    np.testing.assert_allclose(alone.summaries[0].every_f, together.summaries[0].every_f, rtol=1e-9)


def test_what_several_processes_cannot_get_is_rejected(tmp_path):
    case = small_cases()["classification"]
    case = replace(case, make_model=lambda: case.model)
    with pytest.raises(OptionError, match="pickled"):
        run_sbc({"c": case}, {"laplace": PresetMethod("laplace")}, out=tmp_path, n_replications=2, jobs=2)


def unsupported(problem, seed):  # noqa: ARG001
    raise UnsupportedError("a method", received="none", remedy="another.")


def test_replications_without_ranks_are_counted_and_shown(tmp_path):
    case = linear_case(Bernoulli())
    methods = {"none": unsupported, "laplace": PresetMethod("laplace")}
    result = run_sbc({"binary": case}, methods, out=tmp_path, n_replications=2)
    page = write_sbc(result).read_text(encoding="utf-8")
    assert "| binary | none | – | 0, 2 errors |" in page
    assert "2 without ranks: UnsupportedError: Expected a method" in page
    numbers = json.loads((tmp_path / "sbc.json").read_text(encoding="utf-8"))["summaries"]
    assert [entry["n"] for entry in numbers] == [0, 2]
    assert {"sbc_binary.png", "sbc_binary.svg"} <= {path.name for path in tmp_path.iterdir()}


def test_a_prior_that_is_no_distribution_is_rejected():
    case = replace(linear_case(), prior_precision={"bias": 0.0, "weight": 1.0})
    with pytest.raises(OptionError, match="drawn from the prior"):
        case.simulate(0)


def sbc(*words):
    return CliRunner().invoke(app, ["sbc", *(str(word) for word in words)])


MODULE = """
import torch
from bdl_bench import Problem

def make_problem(seed):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)).eval()
    x, y = torch.randn(9, 2), torch.randint(0, 2, (9, 2)).float()
    return Problem(model, "binary", [(x, y)], [(x, y)], [(x, y)], prior_precision=2.0)
"""


def test_the_command_writes_a_page_and_resumes(tmp_path, monkeypatch):
    (tmp_path / "my_sbc_network.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    name = "my_sbc_network:make_problem"
    words = ("--model", name, "--methods", "map", "--n-replications", 1, "--n-queries", 3, "--out", tmp_path / "out")
    result = sbc(*words)
    assert result.exit_code == 0, result.output
    assert Path(result.stdout.splitlines()[-1]) == tmp_path / "out" / "sbc.md"
    record = next((tmp_path / "out").rglob("map/0*.json"))
    time = record.stat().st_mtime_ns
    assert sbc(*words).exit_code == 0
    assert record.stat().st_mtime_ns == time


@pytest.mark.parametrize("words", [("no-such-task",), ("--methods", "none"), ("--n-queries", 3)], ids=str)
def test_bad_usage_of_the_command_ends_with_two(words, tmp_path):
    result = sbc(*words, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "Expected" in result.stderr
