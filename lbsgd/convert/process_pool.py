"""Processes that do a job on chunks of work, whose results come in the chunks' order; nobody waits for the dead.

Each process has a few slots, memory that it shares with its parent, and results that are many bytes lie there instead of
being sent. Chunk c goes to process c mod N: results are awaited in turn, and a process works ahead as far as its slots
reach. A process whose parent is gone ends within a second.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import wait

from lbsgd.errors import ConfigError, DataError, LbsgdError

SLOTS = 3  # a chunk at work, one that waits for its turn, one to begin with meanwhile
SLOT_BYTES = 1 << 23
RESULT_BYTES = 40 << 20  # a process may have this much thrice, beside its slots, and stays below 200 MB

Job = Callable[[object, memoryview], object]


class Workers:
    """N processes; make_job() is called once in each, and gives what does one chunk: job(chunk, slot) -> result."""

    def __init__(self, num_workers: int, make_job: Callable[[], Job]) -> None:
        context = multiprocessing.get_context("fork")
        self.slots = [[mmap.mmap(-1, SLOT_BYTES) for _ in range(SLOTS)] for _ in range(num_workers)]
        self.pipes, self.processes = [], []
        for slots in self.slots:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, slots, make_job, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.kill()
        for process, pipe in zip(self.processes, self.pipes):
            process.join()
            pipe.close()

    def results(self, chunks: Iterable) -> Iterator[tuple[object, memoryview]]:
        """(result, slot) of each chunk, in order; a slot's content lasts until the next one is asked for."""
        turns, chunks, running = self._turns(), iter(chunks), deque()
        places = [next(turns) for _ in range(SLOTS * len(self.processes))]
        while True:
            while places and (chunk := next(chunks, None)) is not None:
                worker, slot = places.pop(0)
                self.pipes[worker].send((slot, chunk))
                running.append((worker, slot))
            if not running:
                return
            worker, slot = running.popleft()
            yield self._receive(worker), memoryview(self.slots[worker][slot])
            places.append((worker, slot))

    def _turns(self) -> Iterator[tuple[int, int]]:
        return ((worker, slot) for slot in range(SLOTS) for worker in range(len(self.processes)))

    def _receive(self, worker: int) -> object:
        pipe = self.pipes[worker]
        with contextlib.suppress(EOFError):
            if pipe in wait([pipe, *(process.sentinel for process in self.processes)]):
                result = pipe.recv()
                if isinstance(result, BaseException):
                    raise result
                return result
        raise self._death()

    def _death(self) -> DataError:
        [dead, *_] = wait([process.sentinel for process in self.processes])
        process = next(process for process in self.processes if process.sentinel == dead)
        process.join()  # its code is there a moment after its death
        code = process.exitcode
        reason = f"killed by signal {-code}, as when memory runs out" if code < 0 else f"exit code {code}"
        return DataError(
            f"one of the processes that read the images died: {reason}; what is done is kept, and the same "
            f"command goes on from there; --num_workers sets how many there are"
        )


def checked_workers(num_workers: int | None) -> int:
    """The number of processes asked for, else one a core. Raises ConfigError."""
    if num_workers is not None and num_workers < 1:
        raise ConfigError(f"--num_workers {num_workers} is not at least 1")
    return num_workers or len(os.sched_getaffinity(0))


def with_room(num_workers: int, result_bytes: int) -> int:
    """How many processes take no more memory than num_workers whose results are of the usual size."""
    return max(1, min(num_workers, num_workers * RESULT_BYTES // result_bytes))


def _work(pipe, slots: list[mmap.mmap], make_job: Callable[[], Job], parent: int) -> None:
    """The life of one process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, which sends it to all; the parent ends them
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        job = make_job()
        while True:
            while not pipe.poll(1):
                if os.getppid() != parent:
                    return
            slot, chunk = pipe.recv()
            with memoryview(slots[slot]) as view:
                pipe.send(job(chunk, view))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except LbsgdError as error:
        pipe.send(error)
    except Exception:
        pipe.send(RuntimeError(traceback.format_exc()))
    while os.getppid() == parent:  # which would take our end for the failure, before it comes to read what failed
        time.sleep(1)
