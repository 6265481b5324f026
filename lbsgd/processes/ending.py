"""How the processes of a run end together."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from lbsgd.errors import LbsgdError, print_error


def from_rank_0(function: Callable[[], Any]) -> Any:
    """What `function` returns on rank 0, on every process, or its LbsgdError; all processes must call it.

    What only rank 0 can find out, such as the state of the output folder, then ends all hosts at once: the others would
    wait for it until the collective call times out.
    """
    import torch  # here, for a process that only has an error to tell should not wait for it

    box = [None]
    if torch.distributed.get_rank() == 0:
        try:
            box = [function()]
        except LbsgdError as error:
            box = [error]
    torch.distributed.broadcast_object_list(box)
    if isinstance(box[0], LbsgdError):
        raise box[0]
    return box[0]


def end_with_error(error: LbsgdError, speak: bool = True) -> NoReturn:
    """Ends this process with the error's exit code, its lines on stderr where this process is the one to speak.

    Nothing is cleaned up: that could wait for the other processes, or for a loader's threads.
    """
    if sys.stdout.isatty():
        sys.stdout.write("\033[?25h")  # the cursor, which the progress bar hides
    sys.stdout.flush()
    if speak:
        print_error(error)
    os._exit(error.exit_code)
