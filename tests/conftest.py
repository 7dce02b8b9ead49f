"""How tests are shared between processes by `pytest -n 2 --dist loadgroup`, and the process that forks others.

Tests of a file stay together, since they share fixtures and cached fits. Those that start processes or wait for a clock
are in one group, so that they never compete with each other. Files of long independent tests are shared test by test.
The longest groups start first, so that no process ends much later than the other.

The groups are made by a scheduler of this file: pytest-xdist 3.8 marks them in the ids of tests, and pytest 9.2 ignores
these marks.
"""

import gc
import os
from pathlib import Path

import pytest
from fork_server import ForkServer

PROCESSES_AND_CLOCKS = {
    "test_checkpoint.py",
    "test_disk.py",
    "test_distributed.py",
    "test_executors.py",
    "test_executors_local.py",
    "test_interruptions.py",
    "test_limit.py",
    "test_resume.py",
    "test_stale_records.py",
    "test_threads.py",
}
RENDERED_REPORT = {"test_report_browser.py", "test_report_page.py"}
TRAINED_PROBLEMS = {"test_agreement.py", "test_lambda_sweeps.py"}
"""Tests of one problem, the first three words of their parameters, share its training, of up to five seconds."""
INDEPENDENT = {
    "test_architectures.py",
    "test_conformance.py",
    "test_docs.py",
    "test_methods.py",
    "test_regvar_draws.py",
    "test_regvar_solvers.py",
    "test_trust.py",
}


def group_of(nodeid):
    """The group of a test: tests of a group run one after another in one process."""
    file = nodeid.partition("::")[0].rpartition("/")[2]
    if file in PROCESSES_AND_CLOCKS:
        return "processes and clocks"
    if file in RENDERED_REPORT:
        return "rendered report"
    if file in TRAINED_PROBLEMS and "[" in nodeid:
        return "-".join(nodeid.partition("[")[2].split("-")[:3])
    return nodeid if file in INDEPENDENT else nodeid.partition("::")[0]


def rank_of(nodeid):
    """The one group of many files first, single tests last, to fill what is left."""
    group = group_of(nodeid)
    return (group == nodeid, group != "processes and clocks")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: rank_of(item.nodeid))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    """Exempt modules and collected tests from garbage collection: to traverse them takes a tenth of all CPU time."""
    gc.collect()
    gc.freeze()


def pytest_configure(config):
    path = os.environ.get("BDL_VERIFICATION_TABLE")
    if path and not hasattr(config, "workerinput"):
        from verification_page import PageWriter  # with the whole library, which not every run of the tests needs

        config.pluginmanager.register(PageWriter(Path(path)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return group_of(nodeid)

    config.option.loadscopereorder = False  # the order is that of the collection
    return ByGroup(config, log) if config.getvalue("dist") == "loadgroup" else None


@pytest.fixture(scope="session")
def fork_server():
    """The process that forks others, one for all tests of a worker."""
    server = ForkServer()
    yield server
    server.close()
