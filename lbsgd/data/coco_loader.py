"""Load examples in separate processes, which end with their run and never before it.

A loader worker's error, a full shared memory and a lost loader worker each end the run with one line.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from lbsgd.data.process_lock import process_lock
from lbsgd.disk import allow_open_files
from lbsgd.errors import ConfigError, DataError
from lbsgd.processes.signals import STOP_SIGNALS, end_with, held_back

ROOM = "in a container give --ipc=host or --shm-size=4g, or do without by --loader_workers 0"
TENSORS = 5  # of an example, each an open file in shared memory
OTHER_FILES = 64  # a reserve for files that are opened later


def loaded(
    data: Dataset, batches: Sequence[Sequence[int]], loader_workers: int, device: torch.device | str = "cpu"
) -> Iterator[list[Any]]:
    """Yield lists of images, loaded by this number of loader workers (in this process with 0).

    The images are in the host's memory, pinned if they are for a GPU, because a copy to the device would otherwise wait
    for the device's work. Raises the DataErrors of workers, a DataError if a worker is lost, and ConfigError if the
    system allows too few open files.
    """
    if loader_workers:
        allow_batches(loader_workers, max(map(len, batches), default=0))
        process_lock(ROOM)  # torch needs locks, and its own error would say less
    loader: DataLoader = DataLoader(
        data,
        batch_sampler=[list(map(int, batch)) for batch in batches],
        num_workers=loader_workers,
        multiprocessing_context="fork" if loader_workers else None,  # Python 3.14 would import everything per worker
        collate_fn=in_shared_memory,
        pin_memory=torch.device(device).type == "cuda",
        worker_init_fn=as_loader_worker,
        generator=torch.Generator(),  # else every epoch would advance torch's own, and a resumed epoch once more
    )
    try:
        with lost_loader_workers_told():
            with held_back():  # a forked worker inherits it, and runs as_loader_worker later
                loading = iter(loader)
            if loader_workers:
                tell_of_lost_loader_workers()
            yield from loading
    except DataError as error:  # a loader worker's; torch passes it on with its traceback in the text
        raise DataError(str(error).rsplit("DataError: ", 1)[-1].strip()) from None


def allow_batches(loader_workers: int, images: int) -> None:
    """Raise this process's limit of open files, which its workers inherit, so that batches of `images` images fit.

    torch loads two batches ahead per worker, and one is in use. A worker has up to three of its own (measured). At the
    limit one of torch's threads prints an error, and the run would wait forever. Raises ConfigError if the system
    forbids a higher limit.
    """
    needed = TENSORS * images * (2 * loader_workers + 2) + len(os.listdir("/proc/self/fd")) + OTHER_FILES
    if (most := allow_open_files(needed)) is not None:
        raise ConfigError(
            f"{loader_workers} loader workers with {images} images a pass need {needed:,} open files, and this system "
            f"allows {most:,}; raise the hard limit (ulimit -Hn), or give a smaller --micro_batch or --loader_workers 0"
        )


def in_shared_memory(batch: list[Any]) -> list[Any]:
    """Return a batch unchanged; a worker moves its tensors to shared memory first.

    torch would move them in a thread, whose errors do not end the run: with a full /dev/shm it would wait forever.
    """
    if get_worker_info() is not None:
        try:
            for tensor in tensors_of(batch):
                tensor.share_memory_()
        except RuntimeError as error:
            raise DataError(f"/dev/shm takes no images of the loader workers ({error}); {ROOM}") from None
    return batch


def tensors_of(part: Any) -> Iterator[torch.Tensor]:
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, (list, tuple, dict)):
        for each in part.values() if isinstance(part, dict) else part:
            yield from tensors_of(each)


@contextlib.contextmanager
def lost_loader_workers_told() -> Iterator[None]:
    """Turn torch's error for a worker that has ended into a DataError."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        if isinstance(error.__cause__, DataError):  # from the handler below, which knows more
            raise error.__cause__ from None
        how = str(error).removeprefix("DataLoader worker").strip().rstrip(".").split(". ")[0]  # the rest is advice
        why = "memory, or the room in /dev/shm, may be too little"
        raise DataError(f"a loader worker {how}: {why}; {ROOM}") from None


class TellsOfLostLoaderWorkers:
    """Wraps torch's SIGCHLD handler, which raises an error wherever the run is when a worker ends, as a DataError."""

    def __init__(self, of_torch: Callable[..., Any]):
        self.of_torch = of_torch

    def __call__(self, number: int, frame: Any) -> None:
        with lost_loader_workers_told():
            self.of_torch(number, frame)


def tell_of_lost_loader_workers() -> None:
    """Wrap torch's handler in ours; a process has torch's from its first worker on."""
    handler = signal.getsignal(signal.SIGCHLD)
    if callable(handler) and not isinstance(handler, TellsOfLostLoaderWorkers):
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            signal.signal(signal.SIGCHLD, TellsOfLostLoaderWorkers(handler))


def as_loader_worker(number: int) -> None:
    """Make a loader worker end with its run and never before it.

    Launchers send signals to all processes, the youngest first, and a run that loses a worker cannot save. A fork would
    also pass signals on to the pipe of the run's guard. And it would free objects that the run has dropped but not yet
    freed: gloo's groups would then end threads that do not exist in a fork.
    """
    gc.freeze()
    signal.set_wakeup_fd(-1)
    for ignored in set(STOP_SIGNALS) - {signal.SIGTERM}:
        signal.signal(ignored, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    run = os.getppid()
    threading.Thread(target=end_when_the_run_says, args=(run,), daemon=True).start()
    end_with(run, signal.SIGKILL)


def end_when_the_run_says(run: int) -> None:
    """End this process when its run sends SIGTERM, and ignore any other sender."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != run:
        pass
    os._exit(0)
