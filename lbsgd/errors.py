"""Errors that end a run early; each argument is a line that says what is wrong, where, and what to do."""

from __future__ import annotations

import math
import os
import sys
import traceback
from contextlib import suppress
from numbers import Integral, Real

from lbsgd.units import printable


class LbsgdError(ValueError):
    """Base of the errors that a user can mend or should know of; recipes print them without a traceback.

    A line end within an argument, such as in a file's name, begins no line on the console.
    """

    exit_code = 2
    label = "error"
    of_rank_0 = False  # whether only process 0 can have found the error
    bug: BaseException | None = None  # the exception behind it, if its traceback is to be printed

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class ConfigError(LbsgdError):
    """The DeepSpeed JSON, its `lbsgd` block or a flag cannot be right."""


class DataError(LbsgdError):
    """The data folder, an FFCV file, annotations, labels or their source cannot be used."""


class CheckpointError(LbsgdError):
    """There is no checkpoint to resume, or it belongs to another recipe or network."""


class TrainingError(LbsgdError):
    """Training cannot go on, for example after a loss that is not a number."""

    exit_code = 3


class DivergedError(TrainingError):
    """The loss, the weights or the scaled gradients of a run are no longer numbers."""


class LostProcessError(LbsgdError):
    """Another process or its host is gone or does not answer."""

    exit_code = 4


class Stopped(LbsgdError):
    """The run was asked to stop, for example by SIGTERM; the error says what it has saved."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later
    label = "stopped"


A_NETWORK = "the network", "give a torch.nn.Module"  # not its parameters, which a torch optimizer takes


def require_type(value: object, kind: type | tuple[type, ...], what: str, way_out: str) -> None:
    """Raise ConfigError if a caller's value has another type, for example because arguments are in the wrong order."""
    if not isinstance(value, kind):
        raise ConfigError(f"{what} is of type {type(value).__name__}; {way_out}")


def require_number(value: object, what: str, at_least: int = 0, *, whole: bool = False) -> None:
    """Raise ConfigError unless a caller's value is a finite number of at least `at_least`, and whole if asked for."""
    if not isinstance(value, Integral if whole else Real) or not math.isfinite(value) or value < at_least:
        raise ConfigError(f"{what} is {value!r}, and must be a {'whole ' * whole}number of at least {at_least}")


def missing_ffcv(error: ImportError) -> DataError:
    """Return the error for a missing FFCV, which classifiers need."""
    return DataError(
        f"FFCV cannot be imported ({one_line(error)}); run `make setup`, or `pip install 'lbsgd[ffcv]'` where "
        "libopencv-dev and libturbojpeg0-dev are installed"
    )


def missing_pycocotools(error: ImportError) -> DataError:
    """Return the error for a missing pycocotools, which detectors need."""
    return DataError(f"pycocotools cannot be imported ({one_line(error)}); `pip install 'lbsgd[detection]'` brings it")


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not empty, or the name of its type."""
    return next(filter(str.strip, str(error).splitlines()), "") or type(error).__name__


def print_error(error: LbsgdError) -> None:
    """Print each line of an error on stderr, after its label: `error: FILE: what is wrong; what to do`.

    A bug's traceback comes before it. Control characters from a file or its name cannot move the cursor. If stderr
    cannot be written to, the process still ends with the error's exit code.
    """
    text = "".join(f"{error.label}: {printable(str(line))}\n" for line in error.args)
    if error.bug:
        text = "".join(traceback.format_exception(error.bug)) + text
    with suppress(OSError, ValueError):
        try:
            print(text, end="", file=sys.stderr, flush=True)
        except RuntimeError:  # we are in a signal handler, and the signal came while stderr was being written
            os.write(sys.stderr.fileno(), text.encode())
