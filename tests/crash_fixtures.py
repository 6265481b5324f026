"""Fixtures that the tests of crashes share; they load this file as a plugin of pytest."""

import os
import random

import pytest
from crash import completed, config
from crash_runs import EVERY, ITERATIONS

SEED = int(os.environ.get("LBSGD_CRASH_SEED") or random.SystemRandom().randrange(10_000))


@pytest.fixture
def rng():
    print(f"LBSGD_CRASH_SEED={SEED}")
    return random.Random(SEED)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    return config(tmp_path_factory.mktemp("config"), iterations=ITERATIONS)


@pytest.fixture(scope="session")
def whole(small, tmp_path_factory):
    """Run a command without any fault."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    completed(small, folder, *EVERY)
    return folder
