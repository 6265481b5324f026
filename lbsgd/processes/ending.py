"""End all processes of a run together, with one error message and the same exit code."""

from __future__ import annotations

import atexit
import errno
import hashlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from lbsgd.errors import ConfigError, LbsgdError, Stopped, print_error
from lbsgd.output import OutputError
from lbsgd.processes.environment import Processes
from lbsgd.processes.launcher import launchers
from lbsgd.processes.signals import at_a_signal

TELLS_SECONDS = 60  # more than a process needs to import torch and to tell the others
HELD: list[socket.socket] = []  # the names that this process holds until its end
CONSOLE_SECONDS = 5.0  # for the console to take an error; then the process ends without it


def from_rank_0(function: Callable[[], Any]) -> Any:
    """Return rank 0's result of `function` on every process, or raise its LbsgdError. All processes must call this.

    An error that only rank 0 can find, such as a wrong output folder, then ends all hosts at once. Otherwise the others
    would wait for rank 0 until the collective call times out.
    """
    import torch  # late, so that a process that only prints an error does not load it

    box: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            box = [function()]
        except LbsgdError as error:
            box = [error]
    torch.distributed.broadcast_object_list(box)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # NCCL has only queued rank 0's message, and rank 0 may end now
    if isinstance(box[0], LbsgdError):
        raise box[0]
    return box[0]


@contextmanager
def found_by_rank_0() -> Iterator[None]:
    """Mark errors that only rank 0 can find, so that `end_before_joining` tells the others."""
    try:
        yield
    except LbsgdError as error:
        error.of_rank_0 = True
        raise


@contextmanager
def before_joining() -> Iterator[None]:
    """End this process and the others by an error of the start (`end_before_joining`)."""
    try:
        yield
    except LbsgdError as error:
        end_before_joining(error)
    except OutputError as error:
        refusal = error.refusal()
        refusal.of_rank_0 = True  # only rank 0 prints
        end_before_joining(refusal)


def end_before_joining(error: LbsgdError) -> NoReturn:
    """End this process before it has met the others, and end the others too.

    Usually all processes of a host find the same error at the same time, and the launcher ends them when the first one
    ends. So the process with local rank 0 prints its error at once. The others print theirs only if they are still
    alive after a while, and no other process of the host is telling of the same error. No launcher ends the processes
    of other hosts, and some launchers end none at all, so this process tells those that wait for it.
    """
    at_a_signal(lambda number: end_with_error(error, quiet=True))  # from srun, for example, once the first has ended
    try:
        processes = Processes.from_environment()
    except ConfigError:  # the environment is wrong, so it does not tell where the others wait
        end_with_error(error)
    if processes.local_rank:
        time.sleep(5)
    if processes.world_size > 1 and another_tells(error):
        end_with_error(error, quiet=True)
    print_error(error)
    if processes.local_rank:
        time.sleep(2)  # the others of its host, which no launcher ends, find it telling
    waited_for = error.of_rank_0 and processes.world_size > 1 and not launchers()
    if waited_for or processes.world_size > processes.local_world_size:
        with suppress(ValueError):  # PyTorch's own import may be what failed
            from lbsgd.processes.peers import tell_before_joining  # late, because it loads PyTorch

            tell_before_joining(processes, error)
    end_with_error(error, quiet=True)


def another_tells(error: LbsgdError) -> bool:
    """Return whether another process of this run and host has told of the same error, once it has told the other hosts.

    A process that tells holds a name, which the system frees when the process ends. Otherwise thousands of processes
    with one mistake in their command would fill the console with one line. The processes of a run and host have the
    same parent, a launcher. Another run may have the same port by mistake, and must print its own error.
    """
    run = [os.getppid(), *(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))]
    name = hashlib.sha256(repr((run, str(error))).encode()).hexdigest()
    holder = socket.socket(socket.AF_UNIX)
    told = False
    for _ in range(TELLS_SECONDS):
        try:
            holder.bind(f"\0lbsgd {name}")  # in Linux's own space of names, without a file
        except OSError as refused:
            told = told or refused.errno == errno.EADDRINUSE
            if not told:
                return False
            time.sleep(1)
        else:
            break
    HELD.append(holder)
    return told


def end_despite_threads(processes: Processes) -> None:
    """End this process, whose work is done, if threads may still be in torch's C++ code.

    Python would end such a thread when it next asks for the interpreter, and C++ then aborts with exit code -6. With
    several processes torch has threads of its own, and on a busy machine one of ours may wait for the job's store. So
    this does what Python does before that: it waits for threads that are no daemons, and calls atexit's functions.
    """
    if processes.world_size == 1 and not any(thread.name.startswith("lbsgd") for thread in threading.enumerate()):
        return
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)


def end_at_a_signal(words: str, quiet: bool = False) -> None:
    """Let a stop signal end this process at once, with exit code 75, until a `Guard` takes over.

    Otherwise Ctrl-C would print a traceback, and no signal would end the first process of a container.
    """

    def end(number: int) -> None:
        is_first = os.environ.get("LOCAL_RANK", "0") == "0"
        end_with_error(Stopped(f"{signal.Signals(number).name}{words}"), quiet or not is_first)

    at_a_signal(end)


def end_with_error(error: LbsgdError, quiet: bool = False) -> NoReturn:
    """End this process with the error's exit code. Unless quiet, print the error's lines on stderr.

    Nothing is cleaned up, because that could wait for other processes or for a loader's threads. The process ends even
    if its console is gone, or blocks while another thread writes to it.
    """
    cut_off = threading.Timer(CONSOLE_SECONDS, os._exit, (error.exit_code,))
    cut_off.daemon = True
    with suppress(RuntimeError):  # no thread can be started any more
        cut_off.start()
    with suppress(OSError, ValueError, RuntimeError):  # RuntimeError: a signal came while stdout was being written
        if sys.stdout and sys.stdout.isatty():
            sys.stdout.write("\033[?25h")  # show the cursor, which the progress bar hides
        if sys.stdout:  # None if it was closed at the start
            sys.stdout.flush()
    if not quiet:
        print_error(error)
    os._exit(error.exit_code)
