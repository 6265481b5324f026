"""Forked processes do not free what their parent has dropped and not freed yet, such as a group of gloo.

Freeing a group waits for threads, which a fork does not have. The fork then dies of a segmentation fault, or hangs.
"""

import gc
import os

import pytest
from torch.utils.data import Dataset

from lbsgd.convert.process_pool import ProcessPool
from lbsgd.data.coco_images import loaded

FREED_IN_A_FORK = 11


class Group:
    """Ends a fork that frees it."""

    def __init__(self):
        self.itself, self.process = self, os.getpid()  # a reference cycle, which waits for the collector

    def __del__(self):
        if os.getpid() != self.process:
            os._exit(FREED_IN_A_FORK)


@pytest.fixture
def dropped_group():
    gc.disable()
    Group()
    yield
    gc.enable()
    gc.collect()


def collect(number, _=None):
    gc.collect()
    return number


class Collects(Dataset):
    def __getitem__(self, number):
        return collect(number)


def end_of_a_bare_fork():
    child = os.fork()
    if not child:
        gc.collect()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_pool_and_loader_workers_free_only_what_is_their_own(dropped_group):
    assert end_of_a_bare_fork() == FREED_IN_A_FORK  # or the two lines below would show nothing
    with ProcessPool(1, lambda: collect) as pool:
        assert [result for result, _ in pool.results([7])] == [7]
    assert list(loaded(Collects(), [[7]], 1)) == [[7]]
