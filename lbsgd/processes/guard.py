"""Threads that end this process when it should not go on: it was told to stop, another one failed, or nothing moves.

The main thread may be held in a collective call that will never return, so nothing here waits for it. Python runs its
signal handlers in that thread, too; the number of a signal therefore comes through a pipe, which C code fills at once.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import psutil

from lbsgd.errors import LbsgdError, LostProcessError, Stopped
from lbsgd.processes.ending import end_with_error
from lbsgd.processes.environment import Processes
from lbsgd.processes.peers import BEAT_SECONDS, OtherFailed, Peers

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_REQUEST_SECONDS = 1.0  # launchers pass a signal on that the terminal has sent as well
SAVE_SECONDS = 25.0  # DeepSpeed's launcher kills 30 s after SIGTERM
LAST_WORDS_SECONDS = 2.0  # what rank 0's store holds goes with it
FIRST_CAUSE_SECONDS = 8.0


class Guard:
    """Watches over one process of a run while its main thread trains.

        with Guard(processes, hang_timeout) as guard:
            guard.follow(peers)             if there are any
            guard.alive("iteration 12")     wherever the main thread gets on
            guard.stop_requested            why the run should save and end, if it should
            guard.nothing_to_save = True    while a checkpoint holds all there is

    launchers: those that started this process, which ends when one of them does. Leaving it with an exception ends the
    process, with the first cause on the console and its exit code, and within hang_timeout seconds all others.
    """

    def __init__(self, processes: Processes, hang_timeout: float, launchers: Sequence[psutil.Process] = ()):
        self.processes, self.hang_timeout = processes, hang_timeout
        self.peers: Peers | None = None
        self.stop_requested: str | None = None
        self.nothing_to_save = True  # so far
        self.position, self.moved = "the start", time.monotonic()
        self.stop_began = time.monotonic()
        self.launchers = launchers
        self.closing, self.ending = threading.Event(), threading.Lock()

    def __enter__(self) -> Guard:
        self.wake, self.waker = os.pipe()
        os.set_blocking(self.waker, False)
        # Those of Python do nothing, for a signal's number goes to the pipe.
        self.handlers_before = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
        self.waker_before = signal.set_wakeup_fd(self.waker, warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self.guard, name="lbsgd guard", daemon=True)
        self.thread.start()
        return self

    def follow(self, peers: Peers) -> None:
        """From here on the other processes are told how this one ends, and this one ends when another has failed."""
        self.peers = peers
        threading.Thread(target=self.follow_peers, name="lbsgd peers", daemon=True).start()

    def __exit__(self, kind, error, _) -> None:
        if error is None:
            return self.close()
        if isinstance(error, SystemExit):
            return
        if not isinstance(error, LbsgdError):
            error = self.explain(error)
        if isinstance(error, LostProcessError) and self.peers:
            error = ask(self.first_cause, FIRST_CAUSE_SECONDS) or error
        self.end(error)

    def close(self) -> None:
        """Ends the threads; signals mean again what they did before."""
        signal.set_wakeup_fd(self.waker_before)
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: set by others than Python
        self.closing.set()
        os.close(self.waker)  # which wakes the thread that reads
        self.thread.join()
        os.close(self.wake)

    def alive(self, position: str) -> None:
        self.position, self.moved = position, time.monotonic()

    # --- how it ends ----------------------------------------------------------------------------------------------------

    def end(self, error: LbsgdError) -> None:
        """Ends this process. One process of all says why, and one of each other host whose failure ended it."""
        self.ending.acquire()  # and never released: the first thread that comes has the word
        self.closing.set()
        if isinstance(error, Stopped):
            speak = self.processes.rank == 0
        elif isinstance(error, OtherFailed):
            speak = error.host != socket.gethostname() and self.processes.local_rank == 0
        else:
            speak = not self.peers or ask(lambda: self.peers.fail(error), LAST_WORDS_SECONDS) is not False
            if self.processes.rank == 0 and self.peers:
                time.sleep(LAST_WORDS_SECONDS)
        end_with_error(error, quiet=not speak)

    def explain(self, error: BaseException) -> LbsgdError:
        """What an exception that is not ours means: another process that is gone, or a bug, whose traceback is printed."""
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        if self.peers and isinstance(error, RuntimeError) and is_of_communication(str(error)):
            return LostProcessError(f"lost another process at {self.position} ({text})")
        traceback.print_exception(error)
        bug = LbsgdError(f"{type(error).__name__}: {text}")
        bug.exit_code = 1
        return bug

    def first_cause(self) -> LbsgdError | None:
        """Why the other process is gone, if it has told, or which one does not answer."""
        try:
            for _ in range(10):
                if failure := self.peers.failure():
                    return failure
                time.sleep(0.2)
            if silent := self.peers.silent():
                return LostProcessError(
                    f"{', '.join(silent)} died or does not answer since {self.position}; --resume goes on "
                    "from the newest checkpoint"
                )
        except RuntimeError:
            return LostProcessError(
                f"rank 0, or the way to its host, is gone since {self.position}; --resume goes on from the "
                "newest checkpoint"
            )
        return None

    # --- the threads ----------------------------------------------------------------------------------------------------

    def guard(self) -> None:
        """Signals, the launcher's death, and time that runs out."""
        while not self.closing.is_set():
            if select.select([self.wake], [], [], 0.5)[0]:
                for number in os.read(self.wake, 64):
                    self.signalled(signal.Signals(number))
            now = time.monotonic()
            if not self.stop_requested and (dead := [launcher for launcher in self.launchers if is_gone(launcher)]):
                self.request_stop(f"its launcher (process {dead[0].pid}) is gone")
            if self.stop_requested and self.nothing_to_save:
                self.tell_to_stop()
                self.end(Stopped(f"{self.stop_requested} at {self.position}; the same command with --resume goes on"))
            if self.stop_requested and now - self.stop_began > SAVE_SECONDS:
                self.end(
                    LostProcessError(
                        f"asked to stop, but nothing could be saved within {SAVE_SECONDS:g} s of {self.position}"
                    )
                )
            if now - self.moved > self.hang_timeout:
                self.end(self.hanging())

    def signalled(self, number: signal.Signals) -> None:
        if number not in STOP_SIGNALS:
            return
        if self.stop_requested and time.monotonic() - self.stop_began > SAME_REQUEST_SECONDS:
            end_with_error(Stopped(f"by a second signal, {number.name}; nothing was saved"))
        self.request_stop(number.name)

    def request_stop(self, reason: str) -> None:
        if not self.stop_requested:
            self.stop_began = time.monotonic()
            self.stop_requested = reason

    def tell_to_stop(self) -> None:
        """Before this process ends without meeting the others again; those look once a second, while rank 0 serves them."""
        if self.peers:
            ask(lambda: self.peers.request_stop(self.stop_requested), LAST_WORDS_SECONDS)
            if self.processes.rank == 0:
                time.sleep(LAST_WORDS_SECONDS)

    def hanging(self) -> LbsgdError:
        """Nothing has moved for too long: the first cause, if it can be found out."""
        if self.peers and (cause := ask(self.first_cause, FIRST_CAUSE_SECONDS)):
            return cause
        return LostProcessError(
            f"nothing has moved for {self.hang_timeout:g} s since {self.position}; another process or the "
            "network does not answer (--hang_timeout)"
        )

    def follow_peers(self) -> None:
        """Gives signs of life, and looks for the first failure and for a request to stop."""
        told = False
        while not self.closing.wait(BEAT_SECONDS):
            try:
                self.peers.beat(self.position)
                failure = self.peers.failure()
                if self.stop_requested and not told:
                    self.peers.request_stop(self.stop_requested)
                    told = True
                elif reason := self.peers.stop_requested():
                    self.request_stop(reason)
                    told = True
            except RuntimeError:  # the store is gone, with rank 0: at the run's end, or before
                if not self.closing.wait(2 * LAST_WORDS_SECONDS):
                    self.end(
                        ask(self.first_cause, FIRST_CAUSE_SECONDS)
                        or LostProcessError(f"rank 0 is gone since {self.position}")
                    )
                return
            if failure and not self.closing.is_set():
                self.end(failure)


def ask(function: Callable[[], Any], seconds: float) -> Any:
    """What the function returns, or None if it takes longer: where the network is cut, the store never answers."""
    answer: list[Any] = []
    thread = threading.Thread(target=lambda: answer.append(function()), daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else None


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended, also where nobody has asked for its exit code yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def is_of_communication(text: str) -> bool:
    return any(
        word in text for word in ("gloo", "Gloo", "NCCL", "ProcessGroup", "Connection", "connection", "Broken pipe")
    )
