"""Check part by part what must be right on a GPU: the tests that need one, `make demo`, a row of Table 1 in fp16."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from lbsgd.bench.figure import Figure, Goal
from lbsgd.bench.parts import Part, Say
from lbsgd.bench.process_tree import end_family
from lbsgd.bench.sizes import BenchSettings
from lbsgd.errors import TrainingError
from lbsgd.experiments.data_sets.digits import DATA_SET as DIGITS
from lbsgd.processes.signals import end_with
from lbsgd.report.run_log import read_run
from lbsgd.report.statistics import difference, spread

OUTCOME = re.compile(r"^(tests/\S+?::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
SUMMARY = re.compile(r"^(FAILED|ERROR) tests/")  # does not match a line of a log, "ERROR    name:file.py:1 ..."
DEMO_GOAL = Goal("at most", 8.0)  # % error, the bound of the demo's own test
LEAST_SEEDS = 2  # of the digits' row; a single one has no interval
SPARE_SECONDS = 3.0  # a part's commands are ended this early, so that the part can still report
SMALL_TESTS = ("tests/test_prefetch.py", "-m", "not gpu", "-k", "cpu and dtype0")
GPU_MARK = "mark.gpu"
# These run first, because the time may end before the last test.
MATTER_MOST = ("test_graphs", "test_norm_kernels", "test_oracle", "test_prefetch")
TAKE_LONG = ("test_gpu",)


def lines_of(command: Sequence[str], given: BenchSettings, **environment: str) -> Iterator[str]:
    """Run a command and yield the lines of its output, which also go to the log; raise TrainingError if it fails."""
    print(f"$ {shlex.join(command)}")
    paths = f"{given.root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    process = subprocess.Popen(
        command,
        cwd=given.root,
        env={**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=partial(end_with, os.getpid(), signal.SIGKILL),
    )
    # End its children, too, because they would hold the pipe open.
    deadline = max(time.monotonic() + 0.1, given.deadline - SPARE_SECONDS)
    timer = threading.Timer(deadline - time.monotonic(), end_family, (process.pid,))
    timer.start()
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="")
        yield line.rstrip("\n")
    timer.cancel()
    if process.wait() != 0:
        why = (
            "ended because its time was over"
            if time.monotonic() >= deadline
            else f"ended with code {process.returncode}"
        )
        raise TrainingError(f"{shlex.join(command)[:200]} {why}; the log has its output")


def run_all(commands: Sequence[Sequence[str]], given: BenchSettings) -> None:
    for command in commands:
        for _ in lines_of(command, given):
            pass


def tests_on_the_device(given: BenchSettings, say: Say) -> None:
    """Run the tests that need a GPU: oracle, batch norm's kernels, prefetcher, repeated bits, kill and resume."""
    root = given.root
    files = [path for path in (root / "tests").glob("test_*.py") if GPU_MARK in path.read_text()]
    files.sort(key=lambda path: (path.stem not in MATTER_MOST, path.stem in TAKE_LONG, path.stem))
    chosen = SMALL_TESTS if given.sizes.is_small else (*(str(path.relative_to(root)) for path in files), "-m", "gpu")
    on_gpu = {} if given.sizes.is_small else {"LBSGD_TEST_ON_GPU": "1"}
    flags = ("-v", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors")
    command, ended = [sys.executable, "-m", "pytest", *flags, *chosen], False
    outcomes: dict[str, str] = {}
    broken: list[str] = []
    try:
        for line in lines_of(command, given, **on_gpu):
            if found := OUTCOME.match(line):
                outcomes[found[1]] = found[2]
            elif SUMMARY.match(line):
                broken.append(line)
        ended = "PASSED" in outcomes.values()
    finally:
        counts = {state: list(outcomes.values()).count(state) for state in sorted(set(outcomes.values()))}
        failed = len(broken) or sum(state in ("FAILED", "ERROR") for state in outcomes.values())
        beside = ", ".join(f"{count} {state.lower()}" for state, count in counts.items())
        goal = Goal("at most", 0) if ended or failed else None  # none if all tests were skipped or did not run
        say(Figure("tests that failed", failed, count=len(outcomes), unit="tests", goal=goal, beside=beside))
        for line in broken:
            say(f"* `{line[:300]}`")


def demo(given: BenchSettings, say: Say) -> None:
    """Run the command of `make demo`: make JPEGs of digits, convert them, train ResNet-50."""
    flags = ["--max_iterations", "1", "--resolution", "16"] if given.sizes.is_small else []
    work_dir = given.folder / "demo"
    run_all([[sys.executable, "tools/demo.py", "--work_dir", str(work_dir), *flags]], given)
    run = read_run(work_dir / "runs/demo")
    if run.value is None:
        say(f"{len(run.iterations)} iteration of kn = {run.header['global_batch']}, no evaluation")
    else:
        say(Figure("make demo, ResNet-50 on digits", run.value, unit="% error", goal=DEMO_GOAL))


def digits_row(given: BenchSettings, say: Say) -> None:
    """Train Table 1's row of the large batch with gradual warmup in fp16, and compare with the published fp32 runs."""
    data = DIGITS
    precision = "fp32" if given.sizes.is_small else "fp16"
    seeds = (0,) if given.sizes.is_small else (0, 1, 2)
    ends = ["--epochs", "1"] if given.sizes.is_small else []
    work_dir = given.folder / "row"
    run_all([[sys.executable, *(part.format(work_dir=work_dir) for part in step)] for step in data.prepare], given)
    errors: list[float] = []
    for seed in seeds:
        folder = work_dir / f"seed{seed}"
        command = [sys.executable, data.recipe, "--deepspeed_config", data.config, "--precision", precision]
        command += ["--data_dir", data.data_dir.format(work_dir=work_dir), "--output_dir", str(folder)]
        try:
            run_all([[*command, "--seed", str(seed), *ends]], given)
        except TrainingError as error:
            if len(errors) < LEAST_SEEDS:
                raise
            say(f"seed {seed}: {error}")
            break
        value = read_run(folder).value
        assert value is not None, f"{folder} has no epoch"
        errors.append(value)
        say(f"seed {seed}: {value:.2f} % in {precision}")
    published = published_errors(given.root)
    apart = difference(errors, published)
    assert apart is not None
    name = f"Table 1 on digits, gradual warmup: {precision} - published fp32"
    goal, beside = Goal("at most", data.margin_pct), f"ours {spread(errors)}, published {spread(published)} %"
    say(Figure(name, *apart, count=len(errors), unit="points", goal=goal, beside=beside))


def published_errors(root: Path) -> list[float]:
    """Return the errors of the row's published runs, kn = 256 with gradual warmup."""
    folders = sorted((root / "results/digits/runs" / f"x{DIGITS.large}").glob("seed*"))
    return [value for folder in folders if (value := read_run(folder).value) is not None]


PARTS = (
    Part("tests", "Tests that need the device", tests_on_the_device, 280),
    Part("demo", "make demo", demo, 120),
    Part("digits", "Table 1's row on digits", digits_row, 180),
)
