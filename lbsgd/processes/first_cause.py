"""Find out why a run cannot go on: a bug, or another process that has failed, has died or does not answer."""

from __future__ import annotations

import dis
import errno
import os
import resource
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from lbsgd.errors import ConfigError, LbsgdError, LostProcessError, one_line
from lbsgd.output import OutputError
from lbsgd.processes.connection import pause
from lbsgd.processes.peers import Peers

FIRST_CAUSE_SECONDS = 8.0
TOLD_SECONDS = 2.0  # of these 8, for a failed process to tell the others
FROM_CHECKPOINT = "--resume goes on from the newest checkpoint"
WORDS_OF_COMMUNICATION = ("gloo", "Gloo", "NCCL", "ProcessGroup", "Connection", "connection", "Broken pipe")
RAISE = dis.opmap["RAISE_VARARGS"]  # the instruction of Python's `raise`
NO_FILES = os.strerror(errno.EMFILE)  # of Python's own OSError, and in gloo's RuntimeError
NO_MEMORY = "can't allocate memory"  # in a RuntimeError of torch's CPU allocator
NO_GPU_MEMORY = (  # in RuntimeErrors of CUDA, NCCL and cuBLAS, which take memory beside torch's allocator
    "CUDA error: out of memory",
    "Cuda failure 2 'out of memory'",
    "Failed to CUDA calloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def explained(error: BaseException, position: str, peers: Peers | None) -> LbsgdError:
    """Return one of our errors for another library's exception.

    It says that the output cannot be written, a process was lost, or memory is full. Any other exception is a bug. Its
    traceback is printed with the error, so only by the process that fails first: a bug often ends all at once.
    """
    if isinstance(error, OutputError):
        return error.refusal()
    text = one_line(error)
    if reason := " ".join(str(error).partition("Last error:")[2].split()):  # NCCL's reason, which its first line lacks
        text = f"{text}: {reason}"
    if lacks_gpu_memory(error, text):  # asked first, because NCCL's words are of communication, too
        others = "compute in --precision bf16 (before the A100 fp16), or leave out CUDA graphs by --no-cuda_graphs"
        return memory_is_full("the GPU's", position, text, others)
    if NO_FILES in str(error):  # asked before what tells of a lost process, because gloo's words are of that, too
        few = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return ConfigError(
            f"this process may open {few:,} files, and needs more at {position} ({text}); raise the limit on its host "
            "(ulimit -n, or -Hn if that is the hard limit)"
        )
    if peers and is_of_communication(error):
        return LostProcessError(f"lost another process at {position} ({text})")
    if isinstance(error, MemoryError) or NO_MEMORY in text:
        return memory_is_full("the host's", position, text, "or fewer --loader_threads")
    bug = LbsgdError(f"{type(error).__name__}: {text}")
    bug.exit_code, bug.bug = 1, error
    return bug


def is_of_communication(error: BaseException) -> bool:
    """Whether gloo, NCCL or a store raised the error, which torch gives no type of their own.

    They are compiled. A RuntimeError with the same words that Python code raises, such as a recipe's, is a bug.
    """
    if not isinstance(error, RuntimeError) or not any(word in str(error) for word in WORDS_OF_COMMUNICATION):
        return False
    innermost = error.__traceback__
    while innermost and innermost.tb_next:
        innermost = innermost.tb_next
    return innermost is None or innermost.tb_frame.f_code.co_code[innermost.tb_lasti] != RAISE


def lacks_gpu_memory(error: BaseException, text: str) -> bool:
    """Whether an error, with its line for the user, says that a GPU's memory is full."""
    of_a_library = isinstance(error, RuntimeError) and any(words in text for words in NO_GPU_MEMORY)
    return of_a_library or type(error).__name__ == "OutOfMemoryError"  # torch's, which this module does not load


def memory_is_full(whose: str, position: str, text: str, others: str) -> ConfigError:
    """Return the error for full memory. others: the ways out other than a smaller micro batch."""
    return ConfigError(
        f"{whose} memory is full at {position} ({text}); take fewer images a pass by --micro_batch, which leaves the "
        f"iteration as it is, {others}"
    )


def first_cause(peers: Peers, position: str) -> LbsgdError | None:
    """Return the first failure that another process reported, or name processes that do not answer, else None."""
    return ask(lambda: look_for_cause(peers, position), FIRST_CAUSE_SECONDS)


def look_for_cause(peers: Peers, position: str) -> LbsgdError | None:
    try:
        if failure := told(peers, TOLD_SECONDS):
            return failure
        if not peers.may_look:
            return told(peers, FIRST_CAUSE_SECONDS)
        if silent := peers.silent():
            return LostProcessError(f"{', '.join(silent)} died or has not answered since {position}; {FROM_CHECKPOINT}")
    except RuntimeError:
        return LostProcessError(f"rank 0, or the way to its host, has been gone since {position}; {FROM_CHECKPOINT}")
    return None


def told(peers: Peers, seconds: float) -> LbsgdError | None:
    """Wait for the first failure that another process reports. None if there is none within `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if failure := peers.failure():
            return failure
        time.sleep(pause(peers.world_size))
    return None


def ask(function: Callable[[], Any], seconds: float) -> Any:
    """Return the store's answer, or None if the store is gone or takes too long, for example if the network is cut."""
    answer: list[Any] = []

    def wait() -> None:
        with suppress(RuntimeError):
            answer.append(function())

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else None
