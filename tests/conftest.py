"""How tests are shared between processes: `pytest -n 2 --dist loadgroup`.

Tests of a file stay together, since they share fixtures and cached fits. Those that start processes or wait for a clock
are in one group, so that they never compete with each other. Files of long independent tests are shared test by test.
"""

import pytest

PROCESSES_AND_CLOCKS = {
    "test_checkpoint.py",
    "test_disk.py",
    "test_distributed.py",
    "test_executors.py",
    "test_executors_local.py",
    "test_interruptions.py",
    "test_limit.py",
    "test_report_browser.py",
    "test_resume.py",
    "test_threads.py",
}
INDEPENDENT = {
    "test_agreement.py",
    "test_architectures.py",
    "test_docs.py",
    "test_lambda_sweeps.py",
    "test_methods.py",
    "test_regvar_draws.py",
    "test_regvar_solvers.py",
    "test_trust.py",
}


def pytest_collection_modifyitems(items):
    for item in items:
        name = item.path.name
        if "page" in getattr(item, "fixturenames", ()):  # one process writes the page of the verification suite
            item.add_marker(pytest.mark.xdist_group("verification page"))
        elif name in PROCESSES_AND_CLOCKS:
            item.add_marker(pytest.mark.xdist_group("processes and clocks"))
        elif name not in INDEPENDENT:
            item.add_marker(pytest.mark.xdist_group(str(item.path.relative_to(item.config.rootpath))))
