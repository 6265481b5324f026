"""The command `lbsgd`, also `python -m lbsgd`; `parser` has the table of its commands."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

# Each command imports what it needs when it runs, and none imports torch or deepspeed, so every command starts fast.
from lbsgd.commands import check, config, convert, plan, report, reproduce
from lbsgd.commands.flag_types import OneLineParser
from lbsgd.commands.plain_letters import print_plain_letters_where_needed
from lbsgd.commands.reader import reader_may_leave
from lbsgd.errors import ConfigError, LbsgdError, Stopped, print_error
from lbsgd.output import OutputError, discard, hold_closed_streams
from lbsgd.units import NOT_INSTALLED, installed

DESCRIPTION = "Large minibatches as in Goyal et al. 2017, on DeepSpeed and FFCV. `python -m lbsgd` is the same command."
EPILOG = (
    "`lbsgd COMMAND --help` lists the flags of a command. To train, run a recipe: `python recipes/resnet50.py --help`."
)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # reasons why writing to an open stream fails


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code.

    0 done, 1 `check` found errors, 2 something given is wrong, 3 a run of `reproduce` failed, 75 `convert` or
    `reproduce` was stopped, and the same command goes on, 130 Ctrl-C. Errors are printed in one line. If the reader of
    the output leaves, commands that only print go on silently; `convert` and `reproduce` end with 2, and say why.
    """
    hold_closed_streams()
    print_plain_letters_where_needed()
    try:
        try:
            return run(sys.argv[1:] if arguments is None else arguments)
        finally:
            flush_output()  # here, where a full disk can still be reported
    except LbsgdError as error:
        print_error(error)
        return error.exit_code
    except OutputError as error:
        return without_output(error)
    except OSError as error:
        if not isinstance(error, BrokenPipeError) and (error.errno not in FULL or error.filename is not None):
            raise  # an error of a file, which the command should have reported
        return without_output(OutputError(error))
    except KeyboardInterrupt:
        print_error(Stopped("Ctrl-C"))
        return 130  # as a shell does: 128 + the signal's number


def run(arguments: list[str]) -> int:
    """Run a command and return its exit code. Raises its errors."""
    commands = parser()
    with reader_may_leave():  # --help prints
        given = commands.parse_args(arguments)
    if given.run is None:
        commands.print_help(sys.stderr)
        commands.exit(2, "\nerror: name one of these commands\n")
    return given.run(given)


def without_output(error: OutputError) -> int:
    """Print an error of writing to standard output, and return its exit code."""
    drop_output()
    refusal = error.refusal()
    print_error(refusal)
    return refusal.exit_code


def flush_output() -> None:
    if sys.stdout is not None:  # it is None if the caller has closed it
        sys.stdout.flush()


def drop_output() -> None:
    """Discard unwritten output, because Python would fail on it again when it exits."""
    with suppress(OSError, ValueError):  # a stream without a file, as in a notebook
        discard(sys.stdout.fileno())


class Version(argparse.Action):
    """Prints the version. It is looked up only then, because that takes too long for the other commands."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        version = installed("lbsgd")
        if version is None:
            raise ConfigError(NOT_INSTALLED)
        print(f"lbsgd {version}")
        parser.exit()


class CommandParser(OneLineParser):
    """The parser of one command. It adds its flags when it parses, because those of `reproduce` take long to load."""

    def __init__(self, *, add_arguments: Callable[[argparse.ArgumentParser], None], **given: Any) -> None:
        super().__init__(**given)
        self.add_arguments = add_arguments

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.add_arguments(self)
        return super().parse_known_args(args, namespace)


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; each command's module adds its own flags."""
    top = OneLineParser(prog="lbsgd", description=DESCRIPTION, epilog=EPILOG)
    top.add_argument("--version", action=Version, nargs=0, help="print the version")
    top.set_defaults(run=None)
    commands = top.add_subparsers(title="commands", metavar="COMMAND", parser_class=CommandParser)
    for name, module, summary in (
        ("plan", plan, "show what a JSON means on N GPUs, and predict how long it takes"),
        ("check", check, "find what is wrong in DeepSpeed JSONs, why it hurts, and the fix"),
        ("config", config, "write a complete JSON for a global batch, or for another library"),
        ("convert", convert, "convert your copy of ImageNet into the FFCV files that training reads"),
        ("report", report, "make tables and curves of runs from their logs"),
        ("reproduce", reproduce, "run a table or figure of the paper, and report it"),
    ):
        command = commands.add_parser(name, help=summary, description=summary, add_arguments=module.add_arguments)
        command.set_defaults(run=module.run)
    return top
