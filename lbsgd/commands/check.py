"""`lbsgd check`: what is wrong in DeepSpeed JSONs, why it hurts, and the fix; and what a code means."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from lbsgd.errors import ConfigError


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the flags of `lbsgd check`."""
    add = command.add_argument
    command.epilog = "Exit code 0: no errors (there may be warnings); 1: errors; 2: something given is wrong."
    add("files", nargs="*", metavar="FILE", help="DeepSpeed JSONs, with or without an lbsgd block, or folders of them")
    add("--json", action="store_true", help="print the findings as JSON, for machines")
    add("--fix", action="store_true", help="write what can be corrected back into the file, and say what changed")
    add(
        "--explain", metavar="CODE", help="print why a code such as D12 hurts, an example and the fix; `all` prints all"
    )
    add("--markdown", action="store_true", help="with --explain all: print docs/checks.md")


def run(given: argparse.Namespace) -> int:
    """Check files, or explain a code; return the exit code."""
    if given.explain:
        return print_explanation(given.explain, as_markdown=given.markdown)
    return check_files(given.files, as_json=given.json, fix=given.fix)


def check_files(files: Sequence[str], as_json: bool = False, fix: bool = False) -> int:
    """Print the findings of files and folders; return 1 if there are errors, else 0."""
    from lbsgd.commands.check_screen import as_dict, print_inspections
    from lbsgd.config.checks.inspect import inspect

    if not files:
        raise ConfigError("lbsgd check: name a DeepSpeed JSON or a folder of them, or a code with --explain")
    inspections = [inspect(file, fix) for given in files for file in in_folder(given)]
    if as_json:
        print(json.dumps(as_dict(inspections), indent=2))
    else:
        print_inspections(inspections)
    return int(any(each.count("error") for each in inspections))


def print_explanation(code: str, as_markdown: bool = False) -> int:
    """Print the entry of a code, or of all; as Markdown, always all: docs/checks.md."""
    from lbsgd.config.checks.explain import explain, explain_all, markdown

    if as_markdown:
        if code != "all":
            raise ConfigError("--markdown writes docs/checks.md, which holds every code: say --explain all")
        print(markdown(), end="")
    else:
        print(explain_all() if code == "all" else explain(code))
    return 0


def in_folder(given: str) -> list[str]:
    """Return the JSONs in a folder and below it; a file stands for itself."""
    if not Path(given).is_dir():
        return [given]
    found = sorted(str(path) for path in Path(given).glob("**/*.json"))
    if not found:
        raise ConfigError(f"{given}: holds no .json file; name a DeepSpeed JSON, or a folder of them")
    return found
