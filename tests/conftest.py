"""Shared by all tests: settings, the report of failures, and handwritten digits as JPEG files and as FFCV files."""

import gc
import os
import signal
import sys
from pathlib import Path

# Set before torch is imported. Tests run on the CPU even if there is a GPU (`make test-gpu` says otherwise). Each
# process has one thread, because small tensors and two processes on two cores lose more by threads than they gain.
if "LBSGD_TEST_ON_GPU" not in os.environ:
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numba
import pytest
from hypothesis import settings
from tool_modules import load_tool

LAST_LINES = 40  # of a failure that are printed at once; the whole report comes at the end

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))  # tests train with the recipes' own tasks

# A shell that starts the tests in the background makes them ignore Ctrl-C, and nohup a hangup. All that they start
# would inherit that. A Python handler is not inherited; this one lets the tests themselves survive a hangup.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)


class FailuresAtOnce:
    """Prints each failure as it happens, so that a suite that hangs later, or is killed, has told it."""

    def __init__(self, terminal):
        self.terminal = terminal

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.terminal.write_line("")
            self.terminal.write_sep("_", f"{report.nodeid}, {report.when}, after {report.duration:.0f} s")
            self.terminal.write_line("\n".join(report.longreprtext.splitlines()[-LAST_LINES:]))


@pytest.hookimpl(trylast=True)  # after the terminal's reporter
def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # the process that prints
        config.pluginmanager.register(FailuresAtOnce(config.pluginmanager.get_plugin("terminalreporter")))


def pytest_collection_finish():
    """Leave what is imported out of each later garbage collection, which takes 0.7 s here, and 1 s in a fork."""
    gc.collect()
    gc.freeze()


settings.register_profile("shared machine", deadline=None)  # an example may wait for other processes
settings.load_profile("shared machine")


@pytest.fixture(scope="session")
def render_digits():
    """tools/render_digits.py as a module."""
    return load_tool("render_digits")


@pytest.fixture(scope="session")
def digits_tree(render_digits, tmp_path_factory):
    """The 1,797 digits as tools/render_digits.py renders them: train/<class>/*.JPEG and val/<class>/*.JPEG."""
    folder = tmp_path_factory.mktemp("digits") / "tree"
    render_digits.render(folder)
    return folder


@pytest.fixture(scope="session")
def digits_data(digits_tree):
    """A complete data folder of all digits, for tests that only read."""
    import lbsgd.data.ffcv_loader  # noqa: F401  imports FFCV so that torch keeps its number of threads
    from lbsgd.convert.convert import convert

    folder = digits_tree.with_name("ffcv")
    convert(digits_tree, folder, max_side=500, quality=90, num_processes=2, overwrite=False)
    return folder


@pytest.fixture(autouse=True)
def numba_s_types_stay_as_they_are():
    """FFCV's own Loader changes one of Numba's types, after which a later test may hang (stock_ffcv.py)."""
    shared = numba.uint8[::1]
    yield
    assert shared.mutable, "this test has changed a type of Numba's: it needs a process of its own"
