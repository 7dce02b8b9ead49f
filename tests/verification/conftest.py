"""One thread: the networks are tiny. And what tests find for docs/verification.md."""

import pytest
import torch
from verification_page import recorder


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def page(record_property):
    """A function (key, finding) that keeps a finding for the page, whichever process the test runs in."""
    return recorder(record_property)
