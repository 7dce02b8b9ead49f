"""150 replications of simulation-based calibration: the sampler has the posterior, approximations differ from it.

The results are on docs/benchmarks/sbc.md. BDL_SBC_DIRECTORY names a directory whose records are continued.
"""

import os
from pathlib import Path

import pytest

from bdl_bench.methods import POSTERIOR
from bdl_bench.verify.sbc import PresetMethod, run_sbc, small_cases

pytestmark = pytest.mark.verification


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    named = os.environ.get("BDL_SBC_DIRECTORY")
    return Path(named) if named else tmp_path_factory.mktemp("sbc")


@pytest.mark.parametrize("case", ["regression", "classification"])
def test_the_sampler_has_uniform_ranks_and_its_intervals_cover(case, directory):
    methods = {POSTERIOR: PresetMethod(POSTERIOR)}
    result = run_sbc({case: small_cases()[case]}, methods, out=directory, n_replications=150)
    summary = result.summary(case, POSTERIOR)
    assert summary.errors == ()
    assert summary.ranked_by == "draws"
    assert summary.ks[1] > 0.01
    assert summary.ks_log_likelihood[1] > 0.01
    assert abs(summary.coverage(0.9)[0] - 0.9) <= 0.03
    assert summary.verdict == "uniform"


@pytest.mark.parametrize("case", ["regression", "classification"])
def test_approximations_that_are_not_the_posterior_are_detected(case, directory):
    methods = {name: PresetMethod(name) for name in ("map", "laplace", "laplace-diag", "regvar", "ensemble")}
    result = run_sbc({case: small_cases()[case]}, methods, out=directory, n_replications=150)
    assert result.summary(case, "map").coverage(0.9)[0] == 0
    assert "too narrow" in result.summary(case, "ensemble").verdict
    assert "log-likelihood not uniform" in result.summary(case, "laplace-diag").verdict
    laplace, regvar = result.summary(case, "laplace"), result.summary(case, "regvar")
    assert abs(laplace.coverage(0.9)[0] - regvar.coverage(0.9)[0]) < 0.01  # the solver of regvar is exact here
