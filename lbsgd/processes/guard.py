"""End this process when it should not go on: it was told to stop, another process failed, or nothing moves.

The main thread may be stuck in a collective call that never returns, so the guard has its own threads, which never wait
for the main thread.
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import psutil

from lbsgd.errors import LbsgdError, LostProcessError, Stopped
from lbsgd.processes.ending import end_with_error
from lbsgd.processes.environment import Processes
from lbsgd.processes.first_cause import ask, explained, first_cause
from lbsgd.processes.launcher import is_gone
from lbsgd.processes.peers import OtherFailed, Peers, tell_before_joining
from lbsgd.processes.signals import StopSignals

SAME_REQUEST_SECONDS = 1.0  # a launcher may pass on a signal that the terminal has also sent to this process
SAVE_SECONDS = 25.0  # DeepSpeed's launcher kills 30 s after SIGTERM
STOPPED_SECONDS = 5.0  # between two looks of the guard, at least, if its process was stopped meanwhile
LAST_WORDS_SECONDS = 2.0  # the store ends with rank 0, and the others look once a second


class Guard:
    """Watches over one process of a run while its main thread trains.

        with Guard(processes, hang_timeout) as guard:
            guard.follow(peers)             if there are any
            guard.alive("iteration 12")     whenever the main thread makes progress
            guard.stop_requested            why the run should save and end, if it should
            guard.nothing_to_save = True    while a checkpoint holds everything
            guard.saved = True              once the run has saved on request and only has to end

    launchers: this process ends when one of its launchers ends. An exception that leaves the `with` block prints the
    first cause and ends the process with its exit code. All other processes end too, within hang_timeout seconds.
    """

    signals: StopSignals  # inside the `with` block
    thread: threading.Thread

    def __init__(self, processes: Processes, hang_timeout: float, launchers: Sequence[psutil.Process] = ()):
        self.processes, self.hang_timeout, self.launchers = processes, hang_timeout, launchers
        self.peers: Peers | None = None
        self.peers_thread: threading.Thread | None = None
        self.stop_requested: str | None = None
        self.nothing_to_save, self.saved = True, False  # so far
        self.position, self.moved = "the start", time.monotonic()
        self.stop_began = time.monotonic()
        self.first_signal: float | None = None  # when this process itself received it
        self.closing, self.ending = threading.Event(), threading.Lock()

    def __enter__(self) -> Guard:
        self.signals = StopSignals()
        self.thread = threading.Thread(target=self.watch, name="lbsgd guard", daemon=True)
        self.thread.start()
        return self

    def follow(self, peers: Peers) -> None:
        """From now on, tell the other processes how this one ends, and end this one if another fails."""
        self.peers = peers
        self.peers_thread = threading.Thread(target=self.follow_peers, args=(peers,), name="lbsgd peers", daemon=True)
        self.peers_thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return self.close()
        if not isinstance(error, LbsgdError):
            error = explained(error, self.position, self.peers)
        if isinstance(error, LostProcessError):
            error = self.first_cause() or error
        self.end(error)

    def close(self) -> None:
        """End the threads and restore the previous signal handlers."""
        self.signals.restore()
        self.closing.set()
        self.signals.wake()
        self.thread.join()
        # Python aborts if it ends while a thread is in the store's C++ code. A limit, because a store may never answer.
        if self.peers_thread:
            self.peers_thread.join(LAST_WORDS_SECONDS)
        self.signals.close()

    def alive(self, position: str) -> None:
        """Note how far the main thread has got. As long as this is called, nothing counts as hanging."""
        self.position, self.moved = position, time.monotonic()

    # --- what can end the process ------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Look for signals, dead launchers and expired time limits, at once and then twice a second."""
        looked = time.monotonic()
        while not self.closing.is_set():
            now = time.monotonic()
            if now - looked > max(STOPPED_SECONDS, self.hang_timeout / 2):
                self.moved = now  # Ctrl-Z, Slurm or a container's pause has stopped this process, so nothing could move
            if not self.stop_requested and (reason := self.lost_launcher()):
                self.request_stop(reason)
            if self.stop_requested:
                self.stop(self.stop_requested)
            moved = self.moved
            if now - moved > self.hang_timeout:
                cause = self.first_cause()  # takes seconds, during which the main thread may move again
                if cause or (self.moved == moved and not self.closing.is_set()):
                    self.end(cause or self.hanging())
            looked = time.monotonic()
            for number in self.signals.wait(0.5):
                self.signalled(number)

    def signalled(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.first_signal is None:
            self.first_signal = now
        if now - self.first_signal > SAME_REQUEST_SECONDS:
            what = "the run was saved" if self.saved else "nothing was saved"
            end_with_error(Stopped(f"by a second signal, {number.name}; {what}"), quiet=self.saved)
        # When a launcher dies, the kernel or DeepSpeed sends SIGTERM, perhaps before we have noticed the death.
        lost_launcher = self.lost_launcher() if number == signal.SIGTERM else None
        self.request_stop(lost_launcher or number.name)

    def lost_launcher(self) -> str | None:
        dead = next(filter(is_gone, self.launchers), None)
        return f"its launcher (process {dead.pid}) is gone" if dead else None

    def request_stop(self, reason: str) -> None:
        """Ask the main thread to save and end. Only the first request counts."""
        if not self.stop_requested:
            self.stop_began = time.monotonic()
            self.stop_requested = reason

    def stop(self, reason: str) -> None:
        """End the process if there is nothing to save, or if the main thread does not save in time."""
        if self.nothing_to_save:
            stopped = Stopped(f"{reason} at {self.position}; the same command with --resume goes on")
            self.last_words(lambda peers: peers.request_stop(reason))  # the others will not meet this process again
            if not (self.peers or self.processes.alone):
                ask(lambda: tell_before_joining(self.processes, stopped), LAST_WORDS_SECONDS)
            self.end(stopped)
        if time.monotonic() - self.stop_began > SAVE_SECONDS:
            late = f"asked to stop, but nothing could be saved within {SAVE_SECONDS:g} s of {self.position}"
            self.end(LostProcessError(late))

    def follow_peers(self, peers: Peers) -> None:
        """Give signs of life, and look for the first failure and for a request to stop."""
        told = False
        while not self.closing.wait(peers.BEAT_SECONDS):
            try:
                peers.beat(self.position)
                failure = peers.failure()
                if self.stop_requested and not told:
                    peers.request_stop(self.stop_requested)
                    told = True
                elif reason := peers.stop_requested():
                    self.request_stop(reason)
                    told = True
            except RuntimeError:  # the store ended with rank 0: at the run's end, or before
                if not self.closing.wait(2 * LAST_WORDS_SECONDS):
                    self.end(self.first_cause() or LostProcessError(f"rank 0 has been gone since {self.position}"))
                return
            if failure and not self.closing.is_set():
                self.end(failure)

    # --- the end -----------------------------------------------------------------------------------------------------

    def end(self, error: LbsgdError) -> None:
        """End this process. One process of the run prints why, and so does one on each other host that ends with it."""
        self.ending.acquire()  # never released, so that only the first thread prints
        self.closing.set()
        if isinstance(error, Stopped):
            quiet = not self.processes.is_rank_0
        elif isinstance(error, OtherFailed):
            quiet = error.host == socket.gethostname() or self.processes.local_rank != 0
            self.last_words(lambda peers: None)  # rank 0 has nothing to add, but others have not yet read it
        else:
            quiet = self.last_words(lambda peers: peers.fail(error)) is False
        end_with_error(error, quiet)

    def last_words(self, tell: Callable[[Peers], Any]) -> Any:
        """Tell the others something before this process ends. Return the answer, None without peers or an answer.

        Rank 0 then waits until the others have read it, because the store ends with rank 0.
        """
        if not (peers := self.peers):
            return None
        answer = ask(lambda: tell(peers), LAST_WORDS_SECONDS)
        if self.processes.is_rank_0:
            time.sleep(LAST_WORDS_SECONDS)
        return answer

    def first_cause(self) -> LbsgdError | None:
        return first_cause(self.peers, self.position) if self.peers else None

    def hanging(self) -> LbsgdError:
        silent = "its device or a disk" if self.processes.world_size == 1 else "another process, the network or a disk"
        return LostProcessError(
            f"nothing has moved for {self.hang_timeout:g} s since {self.position}; {silent} does not answer "
            "(--hang_timeout)"
        )
