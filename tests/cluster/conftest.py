"""Two hosts for a test."""

import hosts
import pytest


@pytest.fixture
def two_hosts(tmp_path_factory):
    """alpha, on which the tests run their commands, and beta."""
    with hosts.cluster(tmp_path_factory.mktemp("hosts"), ["alpha", "beta"]) as both:
        yield both
