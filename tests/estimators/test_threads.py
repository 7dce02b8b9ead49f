"""One fitted estimator, many threads (a web server's pool), torch's modes around a query: the answers stay the same.

Every row of the conformance table, fitted in float32, which autocast would lower.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from threading import Barrier

import pytest
import torch
from conformance_baselines import BASELINES
from conformance_posteriors import POSTERIORS
from conformance_row import names_of
from trust_networks import BUILDERS
from trust_networks.case import SIZES

from estimators import LastLayerLaplace, LinearizedLaplace, LinearResponse, Pointwise, PosteriorDraws, RegVar
from estimators.errors import EstimatorError
from estimators.testing import CASES

ROWS = {**POSTERIORS, **BASELINES}
THREADS, QUERIES = 8, 50  # queries per thread under the whole load: 10 s for each estimator
SHORT_LOAD = 20
SOLVES = {name for name in ROWS if "cg" in name or "pointwise" in name or "signed" in name}  # at every query: slow
MAIN = ("last layer", "draws")  # under some load by default, too
NETWORKS = ("padded-attention", "long-short-term-memory", "forward-hook-adapter", "no-grad-backbone", "checkpointed")
CASE = replace(CASES["classification"], dtype=torch.float32)
MODES = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
}


@cache
def fitted(name):
    row = ROWS[name]
    adapt = row.options.get("adapt", lambda model: model)
    case = case_of(name)
    with torch.random.fork_rng(devices=[]):
        model = adapt(case.module()).eval()
        return row.make(model, case.likelihood, prior_precision=case.delta).fit(case.loader)


def case_of(name):
    """Refits to ten digits are in float64."""
    return CASES["classification"] if "newton" in name else CASE


def pairs(name):
    """Pairs of query rows, each tensor a new one."""
    return [case_of(name).queries[[i, (i + 1) % 7]].clone() for i in range(7)]


def assert_threads_agree(estimator, queries, count):
    """`count` queries a thread, begun together and each in another order."""
    expected = [estimator.variance(x) for x in queries]
    barrier = Barrier(THREADS)

    def work(thread):
        barrier.wait()
        order = [(thread + step) % len(queries) for step in range(count)]
        return [(i, estimator.variance(queries[i])) for i in order]

    with ThreadPoolExecutor(THREADS) as pool:
        answers = [answer for found in pool.map(work, range(THREADS)) for answer in found]
    assert len(answers) == THREADS * count
    for i, variance in answers:
        torch.testing.assert_close(variance, expected[i], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", names_of(ROWS))
def test_many_threads_have_the_answers_of_one(name):
    count = 1 if name in SOLVES else SHORT_LOAD if name in MAIN else 4
    assert_threads_agree(fitted(name), pairs(name), count)


@pytest.mark.verification
@pytest.mark.parametrize("name", names_of(ROWS))
def test_many_threads_under_load_have_the_answers_of_one(name):
    assert_threads_agree(fitted(name), pairs(name), QUERIES)


def row_of(x, i):
    return {key: value[i : i + 1] for key, value in x.items()} if isinstance(x, dict) else x[i : i + 1]


@pytest.mark.filterwarnings("ignore")  # a slower way to the derivative may be announced
@pytest.mark.parametrize("name", NETWORKS)
def test_many_threads_agree_on_networks_whose_derivatives_are_hard(name):
    case = BUILDERS[name]()
    loader = [(x, torch.zeros(n, 2, dtype=torch.float64)) for x, n in zip(case.batches, SIZES, strict=True)]
    estimator = LinearizedLaplace(case.model, "regression", prior_precision=1.7).fit(loader)
    queries = [row_of(case.queries, i) for i in range(4)]
    assert_threads_agree(estimator, queries, 10)


@pytest.mark.parametrize("name", names_of([name for name in ROWS if name not in SOLVES]))
def test_covariances_and_samples_agree_over_threads(name):
    estimator, x = fitted(name), case_of(name).queries
    for method in (lambda: estimator.covariance(x), lambda: estimator.sample(x, 3)):
        try:
            expected = method()
        except EstimatorError:  # it has none
            continue
        with ThreadPoolExecutor(THREADS) as pool:
            answers = [job.result() for job in [pool.submit(method) for _ in range(THREADS)]]
        for answer in answers:
            torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-6)


def with_modes(names):
    """Autocast for each row, and the two modes without gradients in turn; the other pairs run with the verification."""
    parameters = []
    for i, row in enumerate(names):
        in_turn = ("inference mode", "no grad")[i % 2]
        for mode in MODES:
            at_night = [] if mode in ("autocast", in_turn) else [pytest.mark.verification]
            parameters.append(pytest.param(*row.values, mode, marks=[*row.marks, *at_night]))
    return parameters


@pytest.mark.parametrize(("name", "mode"), with_modes(names_of(ROWS)))
def test_a_mode_of_torch_around_a_query_changes_nothing(name, mode):
    estimator, x = fitted(name), case_of(name).queries
    expected = estimator.variance(x)
    with MODES[mode]():
        found = estimator.variance(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert found.dtype == expected.dtype


KINDS = {
    "laplace": LinearizedLaplace,
    "last layer": LastLayerLaplace,
    "pointwise": lambda *a, **k: RegVar(*a, regularizer=Pointwise(), solver=LinearResponse(), **k),
    "draws": lambda *a, **k: RegVar(*a, regularizer=PosteriorDraws(8), solver=LinearResponse(), **k),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_mode_of_torch_around_a_fit_changes_nothing(kind, mode):
    def new():
        return KINDS[kind](CASE.module(), CASE.likelihood, prior_precision=CASE.delta)

    expected = new().fit(CASE.loader).variance(CASE.queries)
    estimator, loader = new(), CASE.loader
    with MODES[mode]():
        estimator.fit(loader)
    torch.testing.assert_close(estimator.variance(CASE.queries), expected, rtol=1e-5, atol=0)


def test_a_fit_does_not_disturb_queries_of_another_estimator():
    """A pool that answers queries while the next model is fitted."""
    estimator, x = fitted("full"), CASE.queries
    expected = estimator.variance(x)

    def fit():
        return LinearizedLaplace(CASE.module(), CASE.likelihood, prior_precision=CASE.delta).fit(CASE.loader)

    with ThreadPoolExecutor(4) as pool:
        fits = [pool.submit(fit) for _ in range(6)]
        queries = [pool.submit(estimator.variance, x) for _ in range(100)]
        for job in queries:
            torch.testing.assert_close(job.result(), expected, rtol=1e-5, atol=0)
        for job in fits:
            torch.testing.assert_close(job.result().variance(x), expected, rtol=1e-5, atol=0)
