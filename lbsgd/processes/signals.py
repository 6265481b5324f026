"""Receive stop signals, even outside the main thread, and ask for a signal when the parent dies."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lbsgd.errors import Stopped

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
PR_SET_PDEATHSIG = 1  # from linux/prctl.h


class StopSignals:
    """Catches the stop signals from its creation on, and hands them to the thread that waits for them.

        signals = StopSignals()         in the main thread
        signals.wait(seconds)           in the other thread, repeatedly
        signals.restore()               in the main thread, to restore the previous handlers
        signals.wake(); thread.join(); signals.close()

    Python runs its signal handlers in the main thread only, which may be stuck in a collective call. So the handlers do
    nothing: C code writes the signal's number into a pipe at once, and any thread can read it there.
    """

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.handlers_before = catch(lambda *_: None)
        self.writer_before = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)

    def wait(self, seconds: float) -> list[signal.Signals]:
        """Return the stop signals that have arrived. Wait for one for at most `seconds`."""
        if not select.select([self.reader], [], [], seconds)[0]:
            return []
        return [signal.Signals(number) for number in os.read(self.reader, 64) if number in STOP_SIGNALS]

    def restore(self) -> None:
        """Restore the previous handlers. Call this in the main thread."""
        signal.set_wakeup_fd(self.writer_before)
        give_back(self.handlers_before)

    def wake(self) -> None:
        """Let the waiting thread return at once."""
        os.close(self.writer)

    def close(self) -> None:
        os.close(self.reader)


class _Stop(BaseException):
    """A stop signal. Not an Exception, so that nothing between the signal and `stoppable` catches it."""


@contextlib.contextmanager
def stoppable(then: str) -> Iterator[None]:
    """End the work at once on a stop signal: raise Stopped, which says how to go on. Only works in the main thread."""

    def stop(number: int, _frame: object) -> None:
        raise _Stop(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        with calling(stop):
            yield
    except _Stop as stopped:
        raise Stopped(f"{stopped}; {then}") from None


@contextlib.contextmanager
def calling(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Call a handler at each stop signal within the block. Use this in the main thread."""
    before = catch(handler)
    try:
        yield
    finally:
        give_back(before)


def catch(handler: Callable[[int, object], None] | signal.Handlers) -> dict[signal.Signals, Any]:
    """Give the stop signals this handler, in the main thread. Return the previous handlers.

    SIGHUP, which a closed terminal sends, stays ignored if it was, because `nohup` relies on that.
    """
    nohup = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
    return {number: signal.signal(number, handler) for number in STOP_SIGNALS if number not in nohup}


def give_back(before: Mapping[signal.Signals, Any]) -> None:
    """Restore the handlers that `catch` returned."""
    for number, handler in before.items():
        signal.signal(number, handler or signal.SIG_DFL)  # None: not set by Python


def at_a_signal(do: Callable[[int], None]) -> None:
    """Call `do` with the number of each stop signal from now on, in the main thread."""
    catch(lambda number, _: do(number))


@contextlib.contextmanager
def handled_afterwards() -> Iterator[None]:
    """Delay the Python handlers of the stop signals until the block ends. Use this in the main thread.

    Blocking the signals would not work: the kernel gives them to a thread that does not block them, such as one of
    NumPy's, and Python still runs the handler in the main thread.
    """
    arrived: list[int] = []
    handlers = {each: before for each in STOP_SIGNALS if callable(before := signal.getsignal(each))}
    for each in handlers:
        signal.signal(each, lambda number, frame: arrived.append(number))
    try:
        yield
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
        for number in arrived:
            signal.raise_signal(number)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Block the stop signals in this thread within the block. A process forked there has to unblock them itself.

    Another thread of this process may still take them, as `handled_afterwards` says.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with(parent: int, by: signal.Signals = signal.SIGTERM) -> None:
    """Ask the kernel for a signal when the parent process dies (Linux). Send it now if the parent is already dead."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, by)
    if os.getppid() != parent:
        os.kill(os.getpid(), by)
