"""Processes that do a job on chunks of work. Results come in the chunks' order, and a dead process is noticed.

Each process shares a few slots of memory with its parent. Large results are put there instead of being sent. Chunk c
goes to process c mod N: results are awaited in turn, and a process works ahead as far as its slots allow. A process
ends within a second of its parent's death.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Generic, NamedTuple, TypeVar

from lbsgd.disk import allow_open_files
from lbsgd.errors import ConfigError, DataError, LbsgdError
from lbsgd.processes.control_groups import usable_cores
from lbsgd.processes.signals import STOP_SIGNALS, held_back
from lbsgd.units import counted, size

CHUNK_IMAGES = 32  # images per chunk
SLOTS = 3  # for a chunk at work, one whose result waits for its turn, and one to begin next
SLOT_BYTES = 1 << 23
PIPE_BYTES = 1 << 16  # always fits into a pipe: a process does not read while it sends a result
OPEN_FILES = 3  # per process, open in its parent and in the processes that start later
OTHER_FILES = 128  # that a process may also have open, such as shards
RESULT_BYTES = 40 << 20  # a process stays below 200 MB with three results of this size and its slots
GOES_ON = "what is done is kept, and the same command goes on from there; --num_processes sets how many there are"

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")
Job = Callable[[Chunk, memoryview], Result]  # a chunk, and a slot for the result's many bytes -> the result


class Running(NamedTuple, Generic[Chunk]):
    """A chunk that was sent to a process and not yet answered."""

    process: int
    slot: int
    num_bytes: int  # of the message
    chunk: Chunk


class ProcessPool(Generic[Chunk, Result]):
    """N processes. Each calls make_job() once, then the returned job for each of its chunks.

    For the message about a dead process, `place` says where its chunk's images are, and `then` what to do.
    """

    def __init__(
        self,
        num_processes: int,
        make_job: Callable[[], Job[Chunk, Result]],
        place: Callable[[Chunk], str] = str,
        then: str = GOES_ON,
    ) -> None:
        _allow_files(num_processes)
        self.place, self.then = place, then
        try:
            self.slots = [[mmap.mmap(-1, SLOT_BYTES) for _ in range(SLOTS)] for _ in range(num_processes)]
        except OSError as error:
            raise ConfigError(
                f"no memory for {counted(num_processes, 'process')}, {size(SLOTS * SLOT_BYTES)} each "
                f"({error.strerror}); give fewer --num_processes"
            ) from error
        self.pipes: list[Connection] = []
        self.processes: list[multiprocessing.process.BaseProcess] = []
        try:
            for slots in self.slots:
                self._start(slots, make_job)
        except BaseException:  # __exit__ is not called if __init__ fails
            self.__exit__()
            raise

    def _start(self, slots: list[mmap.mmap], make_job: Callable[[], Job[Chunk, Result]]) -> None:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        process = context.Process(target=_live, args=(theirs, slots, make_job, os.getpid()), daemon=True)
        # A new process first has its parent's handlers. Without this, a signal would raise there, or be lost.
        with held_back():
            try:
                process.start()
            except OSError as error:
                raise ConfigError(
                    f"cannot start process {len(self.processes) + 1} of {len(self.slots)} ({error.strerror}); give "
                    f"fewer --num_processes, or raise the limit (ulimit -u)"
                ) from error
            self.pipes.append(ours)
            self.processes.append(process)
        theirs.close()

    def __enter__(self) -> ProcessPool[Chunk, Result]:
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.kill()
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.join()
            pipe.close()

    def results(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Result, memoryview]]:
        """Yield (result, slot) of each chunk, in order. A slot keeps its content until the next result is requested.

        Raises the LbsgdError that a job raised, RuntimeError with the traceback of any other exception, and DataError
        if a process has died.
        """
        waiting, running = iter(chunks), deque[Running[Chunk]]()
        free = deque((process, slot) for slot in range(SLOTS) for process in range(len(self.processes)))
        unanswered = [0] * len(self.processes)  # the most bytes that may lie in each pipe
        message = b""  # a chunk for the first free slot, which cannot be sent yet
        while True:
            while free:
                process, slot = free[0]
                if not message and (following := next(waiting, None)) is not None:
                    chunk, message = following, pickle.dumps((slot, following))
                if not message or unanswered[process] and unanswered[process] + len(message) > PIPE_BYTES:
                    break
                self._send(process, message, running)
                running.append(Running(*free.popleft(), len(message), chunk))
                unanswered[process] += len(message)
                message = b""
            if not running:
                return
            result = self._receive(running)
            process, slot, num_bytes, _ = running.popleft()
            yield result, memoryview(self.slots[process][slot])
            unanswered[process] -= num_bytes
            free.append((process, slot))

    def _send(self, process: int, message: bytes, running: Iterable[Running[Chunk]]) -> None:
        try:
            self.pipes[process].send_bytes(message)
        except OSError:
            raise self._death(running) from None

    def _receive(self, running: Sequence[Running[Chunk]]) -> Result:
        """Return the result of the first running chunk.

        Raises DataError if a process has died: its pipe then ends, breaks off or, with a chunk unread, is reset.
        """
        pipe = self.pipes[running[0].process]
        with contextlib.suppress(EOFError, OSError):
            if pipe in wait([pipe, *(process.sentinel for process in self.processes)]):
                result = pipe.recv()
                if isinstance(result, BaseException):
                    raise result
                return result
        raise self._death(running)

    def _death(self, running: Iterable[Running[Chunk]]) -> DataError:
        [sentinel, *_] = wait([process.sentinel for process in self.processes])
        dead = next(number for number, process in enumerate(self.processes) if process.sentinel == sentinel)
        self.processes[dead].join()  # its exit code is available a moment after its death
        code = self.processes[dead].exitcode or 0
        reason = f"killed by signal {-code}, as when memory runs out" if code < 0 else f"exit code {code}"
        if code == DataError.exit_code:  # as `data.mapped` ends it
            reason = "a file can no longer be read: it was made shorter, or its disk fails"
        chunks = [each.chunk for each in running if each.process == dead][self._unread_results(dead) :]
        at = f" at {self.place(chunks[0])}" if chunks else ""
        return DataError(f"one of the processes that read the images died{at}: {reason}; {self.then}")

    def _unread_results(self, process: int) -> int:
        num_results, pipe = 0, self.pipes[process]
        with contextlib.suppress(EOFError, OSError):  # the pipe ends, or a result breaks off
            while pipe.poll():
                pipe.recv_bytes()
                num_results += 1
        return num_results


def checked_num_processes(asked_for: int | None) -> int:
    """Return the number of processes that --num_processes asks for, by default one per core. Raises ConfigError."""
    if asked_for is not None and asked_for < 1:
        raise ConfigError(f"--num_processes {asked_for} is not at least 1")
    return asked_for or usable_cores()


def _allow_files(num_processes: int) -> None:
    """Allow enough open files for the processes. Raises ConfigError if the system allows fewer."""
    needed = OPEN_FILES * num_processes + OTHER_FILES
    if (most := allow_open_files(needed)) is not None:
        raise ConfigError(
            f"{num_processes:,} processes need {needed:,} open files, and this system allows {most:,}; give a smaller "
            f"--num_processes, or raise the hard limit (ulimit -Hn)"
        )


def with_room(num_processes: int, result_bytes: int) -> int:
    """Return how many processes take no more memory than num_processes with results of RESULT_BYTES."""
    return max(1, min(num_processes, num_processes * RESULT_BYTES // result_bytes))


def _live(pipe: Connection, slots: list[mmap.mmap], make_job: Callable[[], Job], parent: int) -> None:
    """Do the job for every chunk from the pipe, as long as the parent lives."""
    gc.freeze()  # never free the parent's garbage here: gloo's groups would end threads that a fork does not have
    for number in STOP_SIGNALS:  # a terminal sends some to all processes, but the parent ends this one, by SIGTERM
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # held back during the fork
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
    except Exception:  # noqa: BLE001  a bug: the parent raises it, with the traceback from here
        pipe.send(RuntimeError(traceback.format_exc()))
    while os.getppid() == parent:  # or the parent would see our end before it reads what failed
        time.sleep(1)
