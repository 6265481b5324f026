"""Run each part of a bench in its own process with a time limit, so that a failing or hanging part spoils no other."""

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

from lbsgd.bench.figure import Figure
from lbsgd.bench.process_tree import descendants, end_family
from lbsgd.bench.results import PartResult, Results
from lbsgd.processes.signals import handled_afterwards

LEAST_SECONDS = 5.0  # a part does not begin with less time left
OUT_OF_TIME = "out of time"
ENDS_BY_ITSELF = "done", "not run", "failed"
WORST = 300  # maximum characters of an error in the results; the log has the traceback

Say = Callable[[Figure | str], None]  # takes each figure and each note as it comes


@dataclass(frozen=True)
class Part:
    """A part of a bench. `run`, a module's function, takes the settings, which hold the deadline, and `say`."""

    name: str
    title: str
    run: Callable[[Any, Say], None]
    most_seconds: float


class NotRun(Exception):
    """A part cannot run here, for example because no images were given; the message says what is missing."""


def run_parts(
    parts: Sequence[Part],
    settings: Any,
    results: Results,
    total_seconds: float,
    preload: Sequence[str] = (),
    together: bool = False,
) -> bool:
    """Run the parts in order within total_seconds. Return whether every part that can run here is done.

    A part without time left is out of time and so not done, even if it could not run here. If this function ends early,
    it ends the running parts.

    preload: modules that all parts need, imported once. They must not touch a GPU, because no forked process could use
    it afterwards. together: run all parts at once, for parts that measure no time.
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
                    with handled_afterwards():  # or a started part could be missing from the list
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
    """A part that runs in its own process, until it has ended or its time is over."""

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
        """Receive a message of the part. Return whether the part has ended or must end."""
        result = self.result
        if not self.connection.poll():
            if time.monotonic() < self.deadline:
                return False
            why = f"stopped after {self.deadline - self.began:.0f} s; what it had found stands here"
            result.state, result.why = OUT_OF_TIME, why
            return True
        try:
            kind, said = self.connection.recv()
        except EOFError:  # it ended without a message
            self.process.join(1.0)
            result.state, result.why = "failed", f"its process ended with code {self.process.exitcode}"
            return True
        if kind == "said":
            (result.figures if isinstance(said, Figure) else result.notes).append(said)
            return False
        result.state, result.why = kind, said
        return True

    def end(self) -> None:
        """End the part's process with all its descendants.

        If the process died without a message, its descendants in other sessions are not found.
        """
        known = descendants(self.process.pid)
        self.connection.close()  # a part that has sent its last message waits for this
        if self.result.state in ENDS_BY_ITSELF:
            self.process.join(1.0)
        end_family(self.process.pid, known)
        self.process.join()
        self.result.seconds = round(time.monotonic() - self.began, 1)


def ready(running: Sequence[Running]) -> list[Running]:
    """Wait until a part says something or its time is over; return all such parts."""
    if not running:
        return []
    seconds = max(0.0, min(each.deadline for each in running) - time.monotonic())
    spoken = wait([each.connection for each in running], seconds)
    return [each for each in running if each.connection in spoken or time.monotonic() >= each.deadline]


def in_its_process(run: Callable[[Any, Say], None], settings: Any, pipe: Connection, log: Path, name: str) -> None:
    """Run a part in this process. Its prints go to the log; its messages and its outcome go into the pipe.

    Then wait until the other side has noted the part's descendants and closed the pipe.
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
    except BaseException as error:  # noqa: BLE001  any error is the part's result, and the other parts go on
        traceback.print_exc()
        lines = traceback.format_exception_only(error)
        pipe.send(("failed", " ".join("".join(lines).split())[:WORST]))
    else:
        pipe.send(("done", ""))
    with suppress(EOFError):
        pipe.recv()
