"""Replications of simulation-based calibration: seeded, in parallel, one file for each, continued after a kill."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bdl_bench.methods.registry import methods_named
from bdl_bench.problem.problem import Problem
from bdl_bench.verify.sbc.case import SbcCase
from bdl_bench.verify.sbc.ranks import Ranks, ranks_of
from bdl_bench.verify.sbc.summary import SbcSummary
from estimators import UncertaintyEstimator
from estimators.errors import EstimatorError, OptionError
from estimators.option_checks import checked_integer, checked_seed
from estimators.persistence.atomic import discard_leftovers, write_text
from estimators.runtime.rng import member_seeds

__all__ = ["PresetMethod", "SbcResult", "run_sbc"]

Build = Callable[[Problem, int], UncertaintyEstimator]
_SETTINGS = "settings.json"


@dataclass(frozen=True)
class PresetMethod:
    """A preset of the comparison by name, which worker processes look up.

    Args:
        name: of the preset.
        prepare: is called first, such as for loading plugins in a worker process; a function of a module.

    Example:
        >>> PresetMethod("laplace").name
        'laplace'
    """

    name: str
    prepare: Callable[[], object] | None = None

    def __call__(self, problem: Problem, seed: int) -> UncertaintyEstimator:
        """Return the estimator of the preset for a problem, not fitted.

        Args:
            problem: the problem.
            seed: of the estimator.

        Returns:
            The estimator.

        Raises:
            OptionError: for an unknown name.
            UnsupportedError: if the preset cannot be used for the problem.
        """
        if self.prepare is not None:
            self.prepare()
        return methods_named([self.name])[0].build(problem, seed)


@dataclass(frozen=True)
class SbcResult:
    """The ranks of every method on every case.

    Attributes:
        summaries: one per case and method.
        out: the directory of the records.
    """

    summaries: tuple[SbcSummary, ...]
    out: Path

    def summary(self, case: str, method: str) -> SbcSummary:
        """Return the summary of a method on a case.

        Args:
            case: the name of the case.
            method: the name of the method.

        Returns:
            The summary.
        """
        return next(s for s in self.summaries if (s.case, s.method) == (case, method))


@dataclass(frozen=True)
class _Job:
    """One replication: the data of one seed, and the methods that have no record of it yet."""

    case: SbcCase
    methods: Mapping[str, Build]
    seed: int
    files: Mapping[str, Path] = field(default_factory=dict)

    def run(self) -> None:
        """Simulate and train once, fit each method, and write a file for each."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            simulation = self.case.simulate(self.seed)
            of_method, of_ranks = member_seeds(self.seed, 2)  # unrelated to the streams of the simulation
            for name, build in self.methods.items():
                record: dict[str, Any] = {"relative_gradient": simulation.relative_gradient}
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # one for each of hundreds of fits
                        estimator = build(simulation.problem, of_method % 2**31)
                        ranks = ranks_of(estimator.fit(simulation.problem.train), simulation, of_ranks)
                    record |= {"f": ranks.f.tolist(), "ranked_by": ranks.ranked_by}
                    record["log_likelihood"] = ranks.log_likelihood
                except EstimatorError as error:
                    record["error"] = f"{type(error).__name__}: {error}"
                write_text(self.files[name], json.dumps(record) + "\n")
        finally:
            torch.set_num_threads(threads)


def run_sbc(
    cases: Mapping[str, SbcCase],
    methods: Mapping[str, Build],
    *,
    out: Path,
    n_replications: int = 150,
    seed: int = 0,
    jobs: int = 1,
    listener: Callable[[int, int], None] = lambda done, total: None,  # noqa: ARG005
) -> SbcResult:
    """Run simulation-based calibration of methods (Talts et al. 2018, "Validating Bayesian inference algorithms").

    In each replication weights are drawn from the prior, and targets from the likelihood at the network with these
    weights. If a method has the posterior of these data, the rank of the true f(x*) among its draws is uniform over
    replications. A method that only approximates the posterior has other ranks; how they differ is its result.

    Args:
        cases: the networks and inputs, by name.
        methods: functions of (problem, seed) that return an estimator, by name, such as `PresetMethod("laplace")`.
        out: the directory of the records, one file for each method and replication. Those that exist are read, not run
            again, so that a killed run continues and a larger `n_replications` extends it.
        n_replications: the number R of data sets of each case.
        seed: of the data sets; a larger `n_replications` begins with those of a smaller one.
        jobs: the number of worker processes. Above 1, cases and methods must be picklable.
        listener: is called with the numbers of finished and of all replications.

    Returns:
        The ranks by case and method.

    Raises:
        OptionError: for an option out of its range, for `jobs` above 1 with what cannot be pickled, and if `out` has
            records of other cases or another seed.

    Example:
        >>> import tempfile
        >>> from bdl_bench.verify.sbc import PresetMethod, run_sbc, small_cases
        >>> cases = {"classification": small_cases()["classification"]}
        >>> methods = {"laplace": PresetMethod("laplace")}
        >>> run_sbc(cases, methods, out=Path(tempfile.mkdtemp()), n_replications=2).summaries[0].n
        2
    """
    n_replications = checked_integer("n_replications", n_replications, at_least=1)
    jobs, seeds = checked_integer("jobs", jobs, at_least=1), member_seeds(checked_seed(seed), n_replications)
    files = {
        (case, method): [out / "records" / case / method / f"{r:05d}.json" for r in range(n_replications)]
        for case in cases
        for method in methods
    }
    for name, case in cases.items():
        _check_settings(out / "records" / name / _SETTINGS, {"case": case.checksum(), "seed": seed})
    pending = list(_pending(cases, methods, seeds, files))
    total = n_replications * len(cases)
    listener(total - len(pending), total)
    for done, _ in enumerate(_finished(pending, jobs), start=total - len(pending) + 1):
        listener(done, total)
    return SbcResult(tuple(_summary(*key, paths, seeds) for key, paths in files.items()), out)


def _pending(
    cases: Mapping[str, SbcCase],
    methods: Mapping[str, Build],
    seeds: Sequence[int],
    files: Mapping[tuple[str, str], Sequence[Path]],
) -> Iterator[_Job]:
    """Yield the replications that lack a record, with the methods that lack one."""
    for r, seed in enumerate(seeds):
        for name, case in cases.items():
            absent = {method: files[name, method][r] for method in methods if not files[name, method][r].exists()}
            for path in absent.values():
                discard_leftovers(path)
            if absent:
                yield _Job(case, {method: methods[method] for method in absent}, seed, absent)


def _finished(pending: Sequence[_Job], jobs: int) -> Iterator[None]:
    """Run the jobs, in this process or in several, and yield after each."""
    if jobs == 1 or len(pending) < 2:
        for job in pending:
            job.run()
            yield
        return
    try:
        pickle.dumps(pending[0])
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise OptionError(
            "cases and methods that can be pickled, for several jobs",
            received=f"{type(error).__name__}: {error}",
            remedy="jobs=1, or functions of a module as make_model and as methods, not lambdas.",
        ) from error
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(pending)), mp_context=context) as pool:
        waiting: set[Future[None]] = {pool.submit(job.run) for job in pending}
        try:
            while waiting:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _check_settings(path: Path, settings: dict[str, object]) -> None:
    """Write the settings of a case, or compare them with those of the records that exist. Raises OptionError."""
    if not path.exists():
        write_text(path, json.dumps(settings) + "\n")
    elif (found := json.loads(path.read_text(encoding="utf-8"))) != settings:
        raise OptionError(
            f"records of the same case and seed in {path.parent}, {settings}",
            received=f"{found}",
            remedy="another --out (out=), which begins anew.",
        )


def _summary(case: str, method: str, paths: Sequence[Path], seeds: Sequence[int]) -> SbcSummary:
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    found = [
        (Ranks(torch.tensor(r["f"], dtype=torch.float64), r["log_likelihood"], r["ranked_by"]), seed)
        for r, seed in zip(records, seeds, strict=True)
        if "error" not in r
    ]
    errors = [record["error"] for record in records if "error" in record]
    gradient = max(record["relative_gradient"] for record in records)
    return SbcSummary.of(case, method, [ranks for ranks, _ in found], [seed for _, seed in found], errors, gradient)
