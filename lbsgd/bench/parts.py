"""Runs the parts of a bench, each in a process of its own and for so long: one that fails or hangs spoils no other."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from lbsgd.bench.family import descendants, end_family
from lbsgd.bench.figure import Figure
from lbsgd.bench.results import PartResult, Results
from lbsgd.processes.signals import handled_afterwards

LEAST_SECONDS = 5.0  # with less left, a part is not begun
OUT_OF_TIME = "out of time"
ENDS_BY_ITSELF = "done", "not run", "failed"
WORST = 300  # characters of an error's line in the results; the log has the traceback

Say = Callable[[Figure | str], None]  # takes each figure and each note as it comes


@dataclass(frozen=True)
class Part:
    """A part: a function of a module that is called with the settings, which hold its deadline, and `say`."""

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

    A part for which no time is left is out of time, so it is not done, whether or not it could run here. What ends this
    function early ends the parts that run.

    preload: modules that all parts need, imported once. They must not touch a GPU, which no forked process can use
    after that. together: all at once, for parts that measure no time.
    """
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(list(preload))
    deadline = time.monotonic() + total_seconds
    waiting = [(part, results.announce(part.name, part.title)) for part in parts]
    running: list[Running] = []
    try:
        while waiting or running:
            while waiting and (together or not running):
                part, result = waiting.pop(0)
                part_deadline = min(deadline, time.monotonic() + part.most_seconds)
                if part_deadline - time.monotonic() < LEAST_SECONDS:
                    result.state, result.why = OUT_OF_TIME, "not begun, because the parts before it took all the time"
                    finish(result, results)
                else:
                    with handled_afterwards():  # else a part that has started may be in no list
                        running.append(Running(forking, part, settings, results, result, part_deadline))
            for each in ready(running):
                if each.has_ended():
                    with handled_afterwards():
                        each.end()
                        running.remove(each)
                    finish(each.result, results)
                results.write()
    finally:
        with handled_afterwards():
            for each in running:
                each.end()
    return all(part.state in ("done", "not run") for part in results.parts)


def finish(result: PartResult, results: Results) -> None:
    results.write()
    results.draw()
    print(f"{result.name:16}{result.state} {result.why}".rstrip(), flush=True)


class Running:
    """A part that runs in a process of its own, until it has ended or its time is over."""

    def __init__(self, forking: Any, part: Part, settings: Any, results: Results, result: PartResult, deadline: float):
        self.result, self.deadline, self.began = result, deadline, time.monotonic()
        self.connection, theirs = forking.Pipe()
        result.state = "running"
        results.write()
        arguments = part.run, replace(settings, deadline=deadline), theirs, results.log, part.name
        self.process = forking.Process(target=in_its_process, args=arguments)
        self.process.start()
        theirs.close()

    def has_ended(self) -> bool:
        """Take in what the part says; return whether it has ended, or has to."""
        result = self.result
        if not self.connection.poll():
            if time.monotonic() < self.deadline:
                return False
            why = f"stopped after {self.deadline - self.began:.0f} s; what it had found stands here"
            result.state, result.why = OUT_OF_TIME, why
            return True
        try:
            kind, said = self.connection.recv()
        except EOFError:  # it ended without a word
            self.process.join(1.0)
            result.state, result.why = "failed", f"its process ended with code {self.process.exitcode}"
            return True
        if kind == "said":
            (result.figures if isinstance(said, Figure) else result.notes).append(said)
            return False
        result.state, result.why = kind, said
        return True

    def end(self) -> None:
        """End the part's process with all that it has started.

        If it died without a word, what it had started in other sessions is not found.
        """
        known = descendants(self.process.pid)
        self.connection.close()  # for which a part that has said its last word waits
        if self.result.state in ENDS_BY_ITSELF:
            self.process.join(1.0)
        end_family(self.process.pid, known)
        self.process.join()
        self.result.seconds = round(time.monotonic() - self.began, 1)


def ready(running: Sequence[Running]) -> list[Running]:
    """Wait until a part says something, or the time of one is over; return those."""
    if not running:
        return []
    seconds = max(0.0, min(each.deadline for each in running) - time.monotonic())
    spoken = wait([each.connection for each in running], seconds)
    return [each for each in running if each.connection in spoken or time.monotonic() >= each.deadline]


def in_its_process(run: Callable[[Any, Say], None], settings: Any, pipe: Connection, log: Path, name: str) -> None:
    """Run a part here; what it prints goes to the log, what it says and how it ends into the pipe.

    It then waits until the other side has seen what it has started, and closes the pipe.
    """
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, 1), os.dup2(file, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    print(f"\n--- {name}, {settings.deadline - time.monotonic():.0f} s")
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
    with suppress(EOFError):
        pipe.recv()
