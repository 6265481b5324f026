"""`lbsgd check`: find what is wrong in DeepSpeed JSONs, why it hurts, and the fix; explain a code."""

from __future__ import annotations

import argparse
import json
import shutil
import sys

from lbsgd.commands.flag_types import require_alone
from lbsgd.commands.reader import reader_may_leave
from lbsgd.config.libraries.arguments import LIBRARIES
from lbsgd.errors import ConfigError
from lbsgd.units import printable


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the flags of `lbsgd check`."""
    add = command.add_argument
    command.epilog = "Exit code 0: no errors (there may be warnings); 1: errors; 2: something given is wrong."
    add("files", nargs="*", metavar="FILE", help="DeepSpeed JSONs, with or without an lbsgd block, or folders of them")
    add("--json", action="store_true", help="print the findings as JSON, for machines")
    add("--fix", action="store_true", help="write what can be corrected back into the file, and say what changed")
    clashes = f"find what would clash in this library: {', '.join(LIBRARIES)}"
    add("--for", dest="library", choices=LIBRARIES, metavar="LIBRARY", help=clashes)
    add(
        "--explain",
        metavar="CODE",
        help="explain a code such as D12, with an example and the fix; `all` explains every code",
    )
    add(
        "--deepspeed",
        metavar="VERSION",
        help="check against this version of DeepSpeed, 0.16 to 0.19 (default: the installed one); "
        "a range such as 0.16..0.19 prints a table of what changes",
    )
    add("--markdown", action="store_true", help="with --explain all: print docs/checks.md")


@reader_may_leave()
def run(given: argparse.Namespace) -> int:
    """Check files, or explain a code. Return the exit code."""
    if given.explain is not None:
        require_alone(given, "--explain", beside=("--markdown",))
    if given.markdown and given.explain != "all":
        raise ConfigError("--markdown writes docs/checks.md, which holds every code: say --explain all")
    if given.explain is not None:
        return print_explanation(given.explain, as_markdown=given.markdown)
    return check_files(given)


def check_files(given: argparse.Namespace) -> int:
    """Print the findings of files and folders, as used by a library if one is given. Return 1 if there are errors.

    Raises ConfigError after printing the rest, if something could not be checked.
    """
    from lbsgd.commands.check_files import files_of
    from lbsgd.commands.check_screen import as_dict, print_inspections
    from lbsgd.commands.check_versions import print_versions, versions_in
    from lbsgd.config.accepted.schema import installed
    from lbsgd.config.checks.in_library import in_library
    from lbsgd.config.checks.inspection import inspect

    if not given.files:
        raise ConfigError("lbsgd check: name a DeepSpeed JSON or a folder of them, or a code with --explain")
    versions = versions_in(installed() if given.deepspeed is None else given.deepspeed)
    if len(versions) > 1 and (given.json or given.fix or given.library):
        raise ConfigError("lbsgd check: a range of versions is a table; --json, --fix and --for want one version")
    files = files_of(given.files)
    for name in files.empty:  # to stderr, because stdout may be JSON
        print(printable(f"{name} is empty, passed over"), file=sys.stderr)
    for line in files.unread:
        print(printable(f"{line}, passed over"), file=sys.stderr)
    if given.fix:
        files.require_correctable()  # before anything is written
    if len(versions) > 1:
        code = print_versions(files.checked, versions, len(files.others))
        files.require_all()
        return code
    inspections = [inspect(file, given.fix, versions[0]) for file in files.checked]
    if given.library:
        inspections = [in_library(each, given.library) for each in inspections]
    if given.json:
        print(json.dumps(as_dict(inspections, versions[0], len(files.others)), indent=2))
    else:
        print_inspections(inspections, passed_over=len(files.others))
    files.require_all()
    return int(any(each.count("error") for each in inspections))


def print_explanation(code: str, as_markdown: bool) -> int:
    """Print the entry of a code, or of all codes. As Markdown it is always all of them: docs/checks.md."""
    from lbsgd.config.checks.explain import WIDTH, explain, explain_all, markdown
    from lbsgd.report.lines import on_terminal

    if as_markdown:
        print(markdown(), end="")
    else:
        width = shutil.get_terminal_size().columns if on_terminal() else WIDTH
        print(explain_all(width) if code == "all" else explain(code, width))
    return 0
