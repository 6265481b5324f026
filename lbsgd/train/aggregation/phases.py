"""The three phases of an aggregation (Sec. 4). While a bucket is in one phase, the next one is in the previous phase.

    1  reduce-scatter inside each server: every process has 1/L of the server's sum
    2  all-reduce of these shares between the servers, with the division
    3  all-gather inside each server

A flat aggregation has only phase 2. Halving/doubling splits it into two phases: one bucket doubles while the next one
halves, which keeps the link busy while a process adds or waits for its partner.

gloo's calls block, so each phase has a thread. On a GPU it has a stream. Each phase has its own groups, so calls of two
phases never meet.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from lbsgd.config.aggregation import Choice
from lbsgd.train.aggregation.collectives import Backend, Collective
from lbsgd.train.aggregation.halving_doubling import HalvingDoubling
from lbsgd.train.aggregation.placement import Placement


class Job:
    """One bucket on its way through the phases.

    share: the part that this process sums between servers. piece: the part of the share whose sum halving leaves here.
    """

    def __init__(self, buffer: torch.Tensor):
        self.buffer = self.share = self.piece = buffer
        self.done = threading.Event()
        self.error: BaseException | None = None


Phase = Callable[[Job], None]


def phases_of(choice: Choice, placement: Placement, device: torch.device, divisor: float) -> list[Phase]:
    """Return this process's phases. All processes must call this, because it makes groups."""
    rank, timeout = dist.get_rank(), timeout_of(device)
    everybody = tuple(range(dist.get_world_size()))
    inside: tuple[int, ...]
    if choice.hierarchy == "flat":
        inside, between = (rank,), everybody
        columns = [everybody]
    else:
        inside, between = placement.of(rank)
        columns = [*zip(*placement.servers, strict=True)]

    def collective(algorithm: str, ranks: tuple[int, ...], lists: Sequence[Sequence[int]]) -> Collective:
        group = groups(lists, rank, timeout)
        if algorithm == "backend":
            return Backend(ranks, group, rank)
        # NCCL sends both ways at once.
        return HalvingDoubling(ranks, group, rank, None if device.type == "cuda" else groups(lists, rank, timeout))

    numbers = range(2 if choice.between == "halving_doubling" else 1)
    middle = between_servers([collective(choice.between, between, columns) for _ in numbers], divisor)
    if len(inside) == 1:
        return middle
    first, last = (collective(choice.inside, inside, placement.servers) for _ in range(2))

    def scatter(job: Job) -> None:
        job.share = first.reduce_scatter(job.buffer)

    def gather(job: Job) -> None:
        last.all_gather(job.buffer)

    return [scatter, *middle, gather]


def between_servers(collectives: Sequence[Collective], divisor: float) -> list[Phase]:
    """Return phase 2: one phase for one collective, halving and doubling for two. divisor: divides the sum."""
    first, last = collectives[0], collectives[-1]

    def divide(part: torch.Tensor) -> None:
        if divisor != 1:
            part.mul_(1 / divisor)

    def whole(job: Job) -> None:
        first.all_reduce(job.share)
        divide(job.share)

    def halve(job: Job) -> None:
        job.piece = first.reduce_scatter(job.share)
        divide(job.piece)

    def double(job: Job) -> None:
        last.all_gather(job.share)

    return [whole] if first is last else [halve, double]


def groups(lists: Sequence[Sequence[int]], rank: int, timeout: timedelta) -> dist.ProcessGroup | None:
    """Make a group of each list of ranks and return this process's. All processes must do so in the same order."""
    mine = None
    for ranks in lists:
        group = dist.new_group(list(ranks), timeout=timeout)
        if rank in ranks:
            mine = group
    return mine


def timeout_of(device: torch.device) -> timedelta:
    """Return the first group's timeout, because torch would give new groups its default of 30 minutes."""
    return dist.distributed_c10d._get_default_group()._get_backend(device).options._timeout


# --- runners ----------------------------------------------------------------------------------------------------------


CLOSE_SECONDS = 5.0  # enough for idle threads to end


class Threads:
    """Runs phases on buffers in host memory, each in a daemon thread that ends with this object or before Python."""

    def __init__(self, phases: Sequence[Phase]):
        self.queues = [queue.SimpleQueue[Job | None]() for _ in phases]
        self.threads = []
        for number, phase in enumerate(phases):
            rest = self.queues[number + 1 : number + 2]
            arguments = (phase, self.queues[number], rest[0] if rest else None)
            name = f"lbsgd phase {number + 1}"
            self.threads.append(threading.Thread(target=work, args=arguments, name=name, daemon=True))
            self.threads[-1].start()
        # Also at the interpreter's exit: a thread ended then, inside torch's C++ code, would abort the process.
        self.close = weakref.finalize(self, end, self.queues[0], self.threads)

    def start(self, buffer: torch.Tensor) -> Job:
        job = Job(buffer)
        self.queues[0].put(job)
        return job

    def wait(self, job: Job) -> None:
        """Return once the buffer holds the mean. Raises what a phase raised."""
        job.done.wait()
        if job.error:
            raise job.error


def end(jobs: queue.SimpleQueue[Job | None], threads: Sequence[threading.Thread]) -> None:
    """End the threads of phases once they have no more work."""
    jobs.put(None)
    if threading.current_thread() in threads:  # Python has freed the object there, and this thread must go on to end
        return
    deadline = time.monotonic() + CLOSE_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


def work(phase: Phase, jobs: queue.SimpleQueue[Job | None], rest: queue.SimpleQueue[Job | None] | None) -> None:
    """Run one phase of each job and pass the job on. After an error run no more, because the group is broken."""
    error: BaseException | None = None
    while job := jobs.get():
        try:
            if job.error is None and error is None:
                phase(job)
        except BaseException as raised:  # noqa: BLE001  raised again where the main thread waits
            error = raised
        job.error = job.error or error
        if rest:
            rest.put(job)
        if job.error or not rest:
            job.done.set()
    if rest:
        rest.put(None)


class Streams:
    """Runs phases on buffers in GPU memory, each in a stream. No call blocks the host."""

    def __init__(self, phases: Sequence[Phase]):
        self.phases = phases
        self.streams = [torch.cuda.Stream() for _ in phases]

    def start(self, buffer: torch.Tensor) -> Job:
        job, before = Job(buffer), torch.cuda.current_stream()
        for phase, stream in zip(self.phases, self.streams, strict=True):
            stream.wait_stream(before)
            with torch.cuda.stream(stream):
                phase(job)
            before = stream
        return job

    def close(self) -> None:
        """Do nothing, because streams need not be ended."""

    def wait(self, job: Job) -> None:
        """Let the current stream wait for the phases."""
        torch.cuda.current_stream().wait_stream(self.streams[-1])


def runner(phases: Sequence[Phase], device: torch.device) -> Threads | Streams:
    """Return what runs the phases during back-propagation: streams on a GPU, else threads."""
    return Streams(phases) if device.type == "cuda" else Threads(phases)
