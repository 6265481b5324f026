"""Runs the parts of a bench, each in a process of its own and for so long: one that fails or hangs spoils no other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lbsgd.bench.figure import Figure
from lbsgd.bench.results import PartResult, Results

LEAST_SECONDS = 5.0  # with less left, a part is not begun
OUT_OF_TIME = "out of time"
WORST = 300  # characters of an error's line in the results; the log has the traceback

Say = Callable[[Figure | str], None]  # takes each figure and each note as it comes


@dataclass(frozen=True)
class Part:
    """A part: a function of a module that is called with the settings, which hold its seconds, and `say`."""

    name: str
    title: str
    run: Callable[[Any, Say], None]
    most_seconds: float


class NotRun(Exception):
    """A part has nothing to run on here, as where no images were given; its words say what is missing."""


def run_parts(
    parts: Sequence[Part],
    settings: Any,
    results: Results,
    total_seconds: float,
    preload: Sequence[str] = (),
    together: bool = False,
) -> bool:
    """Run the parts in order within total_seconds; return whether all that could run are done.

    A part for which no time is left is out of time, so it is not done, whether or not it could run here.

    preload: modules that all parts need, imported once. They must not touch a GPU, which no forked process can use
    after that. together: all at once, for parts that measure no time.
    """
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(list(preload))
    deadline = time.monotonic() + total_seconds
    announced = [results.announce(part.name, part.title) for part in parts]

    def run(part: Part, result: PartResult) -> None:
        seconds = min(part.most_seconds, deadline - time.monotonic())
        if seconds < LEAST_SECONDS:
            result.state, result.why = OUT_OF_TIME, "not begun, because the parts before it took all the time"
        else:
            run_part(forking, part, settings, results, result, seconds)
        results.write()
        results.draw()
        print(f"{part.name:16}{result.state} {result.why}".rstrip(), flush=True)

    with ThreadPoolExecutor(len(parts) if together else 1) as pool:
        list(pool.map(run, parts, announced))
    return all(result.state in ("done", "not run") for result in announced)


def run_part(forking: Any, part: Part, settings: Any, results: Results, result: PartResult, seconds: float) -> None:
    """Run one part; results are written with whatever it says."""
    ours, theirs = forking.Pipe(duplex=False)
    arguments = part.run, replace(settings, seconds=seconds), theirs, results.log, part.name
    process = forking.Process(target=in_its_process, args=arguments)
    began = time.monotonic()
    result.state = "running"
    results.write()
    process.start()
    theirs.close()
    result.state, result.why = listen(ours, result, results, seconds)
    end_group(process)
    if not result.state:
        result.state, result.why = "failed", f"its process ended with code {process.exitcode}"
    result.seconds = round(time.monotonic() - began, 1)


def listen(connection: Connection, result: PartResult, results: Results, seconds: float) -> tuple[str, str]:
    """Take in what a part says until it ends; return its state, empty where it ended without a word."""
    deadline = time.monotonic() + seconds
    while True:
        if not connection.poll(max(0.0, deadline - time.monotonic())):
            return OUT_OF_TIME, f"stopped after {seconds:.0f} s; what it had found stands here"
        try:
            kind, said = connection.recv()
        except EOFError:
            return "", ""
        if kind != "said":
            return kind, said
        (result.figures if isinstance(said, Figure) else result.notes).append(said)
        results.write()


def end_group(process: Any) -> None:
    """End a part's process with all that it has started, compilers' workers among them."""
    process.join(1.0)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.join()


def in_its_process(run: Callable[[Any, Say], None], settings: Any, pipe: Connection, log: Path, name: str) -> None:
    """Run a part here; what it prints goes to the log, what it says and how it ends into the pipe."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    print(f"\n--- {name}, {settings.seconds:.0f} s")
    try:
        run(settings, lambda said: pipe.send(("said", said)))
    except NotRun as reason:
        pipe.send(("not run", str(reason)))
    except BaseException as error:  # noqa: BLE001  whatever ends a part is a result, and the other parts go on
        traceback.print_exc()
        lines = traceback.format_exception_only(error)
        pipe.send(("failed", " ".join("".join(lines).split())[:WORST]))
    else:
        pipe.send(("done", ""))
