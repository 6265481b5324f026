"""The command `lbsgd`, also `python -m lbsgd`.

lbsgd plan FILE --gpus 256          what a JSON means on N GPUs, and how long it would take
lbsgd check FILE [FILE ...]         what is wrong in a DeepSpeed JSON, why it hurts, and the fix
lbsgd config --global_batch KN      a complete JSON for a global batch
lbsgd convert --source IMAGENET     your copy of ImageNet -> the FFCV files that training reads
lbsgd report RUN [RUN ...]          table and curves of runs
lbsgd reproduce EXPERIMENT DATA     runs a table or figure of the paper, and reports it
"""

from __future__ import annotations

import argparse
import sys

# Each command imports what it needs when it runs, and none imports torch or deepspeed: every command starts at once.
from lbsgd.commands import config, plan, report, reproduce
from lbsgd.config.libraries.arguments import LIBRARIES
from lbsgd.errors import LbsgdError, print_error
from lbsgd.processes.plain_letters import print_plain_letters_where_needed


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code.

    0 done, 1 `check` found errors, 2 something given is wrong (one line says what).
    """
    print_plain_letters_where_needed()
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["convert"]:  # its own parser refuses a flag in one line
        from lbsgd.commands.convert import main as convert

        return convert(arguments[1:])
    given = parser().parse_args(arguments)
    try:
        return given.run(given)
    except LbsgdError as error:
        print_error(error)
        return error.exit_code
    except BrokenPipeError:  # `lbsgd plan ... | head`
        sys.stderr.close()
        return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; each command's module adds its own flags."""
    top = argparse.ArgumentParser(
        prog="lbsgd", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    for name, arguments, run, summary in (
        ("plan", plan.add_arguments, plan.run, "what a JSON means on N GPUs, and how long it would take"),
        ("check", check_arguments, run_check, "what is wrong in DeepSpeed JSONs, why it hurts, and the fix"),
        ("config", config.add_arguments, config.run, "a complete JSON for a global batch"),
        ("convert", lambda command: None, None, "your copy of ImageNet -> the FFCV files that training reads"),
        ("report", report.add_arguments, report.run, "table and curves of runs"),
        ("reproduce", reproduce.add_arguments, reproduce.run, "runs a table or figure of the paper, and reports it"),
    ):
        command = commands.add_parser(name, help=summary, description=summary)
        arguments(command)
        command.set_defaults(run=run)
    return top


# --- check ------------------------------------------------------------------------------------------------------------


def check_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    command.epilog = "Exit code 0: no errors (there may be warnings); 1: errors; 2: something given is wrong."
    add("files", nargs="*", metavar="FILE", help="DeepSpeed JSONs, with or without an lbsgd block, or folders of them")
    add("--json", action="store_true", help="print the findings as JSON, for machines")
    add("--fix", action="store_true", help="write what can be corrected back into the file, and say what changed")
    add("--for", dest="library", choices=LIBRARIES, help="find what would clash in this library")
    add(
        "--explain", metavar="CODE", help="print why a code such as D12 hurts, an example and the fix; `all` prints all"
    )
    add("--markdown", action="store_true", help="with --explain all: print docs/checks.md")


def run_check(given: argparse.Namespace) -> int:
    from lbsgd.commands.check import check_files, print_explanation

    if given.explain:
        return print_explanation(given.explain, as_markdown=given.markdown)
    return check_files(given.files, as_json=given.json, fix=given.fix, library=given.library)
