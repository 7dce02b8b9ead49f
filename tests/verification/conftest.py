"""One thread: the networks are tiny. And the page that the whole suite writes, docs/verification.md."""

import os
from pathlib import Path

import pytest
import torch
from verification_page import Page


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def page():
    """Written at the end of the session to the file that BDL_VERIFICATION_TABLE names, if it names one."""
    found = Page()
    yield found
    path = os.environ.get("BDL_VERIFICATION_TABLE")
    if path and (found.verifications or found.outcomes):
        found.write(Path(path))
