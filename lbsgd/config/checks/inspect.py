"""`lbsgd check`: DeepSpeed JSONs, ours and other people's, with every finding, why it hurts, and the fix."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbsgd.config.checks import consistency as check
from lbsgd.config.checks.consistency import DELETE, Finding
from lbsgd.config.checks.deviations import deviation_findings
from lbsgd.config.checks.lbsgd_json import deepspeed_findings
from lbsgd.config.checks.plain_deepspeed import foreign_findings
from lbsgd.config.checks.rerouted import rerouted_findings
from lbsgd.config.json_file import differences, put, read_json, recipe_or_findings, write_json
from lbsgd.errors import ConfigError
from lbsgd.units import counted

SEVERITIES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


@dataclass(frozen=True)
class Inspection:
    """A file with its findings, the worst first; config is None where it could not be read."""

    file: str
    config: dict[str, Any] | None
    findings: tuple[Finding, ...]
    fixed: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        return self.config is not None and "lbsgd" in self.config

    def count(self, severity: str) -> int:
        return sum(finding.severity == severity for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "lbsgd_block": self.ours,
            "fixed": list(self.fixed),
            "findings": [
                {
                    "severity": f.severity,
                    "code": f.code,
                    "key": f.key,
                    "message": f.message,
                    "fix": f.fix,
                    "points": f.points,
                }
                for f in self.findings
            ],
        }


def findings_of(config: dict) -> tuple[Finding, ...]:
    """Everything to say about a parsed JSON, by its own kind: with an `lbsgd` block, or without."""
    found = our_findings(config) if "lbsgd" in config else foreign_findings(config)
    return tuple(sorted(found, key=lambda finding: list(SEVERITIES).index(finding.severity)))


def our_findings(config: dict) -> list[Finding]:
    """What `Plan.read` would refuse or warn of, on any number of GPUs, all at once."""
    recipe, found = recipe_or_findings(config)
    found = [*deepspeed_findings(config), *found]
    if recipe is None or any(finding.code == "D04" for finding in found):
        return found
    found += [*check.recipe_findings(config, recipe), *deviation_findings(config, recipe)]
    found += rerouted_findings(config, recipe)
    return found + list(
        check.fit_findings(recipe, config["train_batch_size"], config["train_micro_batch_size_per_gpu"], 1)
    )


def inspect(file: str, fix: bool = False) -> Inspection:
    """Reads and checks a file; with fix, writes back what a program can correct."""
    try:
        config = read_json(file)
    except ConfigError as error:
        return inspect_unstrict(file, str(error))
    if not fix:
        return Inspection(file, config, findings_of(config))
    mended = corrected(config)
    changes = differences(config, mended)
    if changes:
        write_json(file, mended)
    return Inspection(file, mended, findings_of(mended), changes)


def inspect_unstrict(file: str, reason: str) -> Inspection:
    """A file that is no strict JSON. DeepSpeed reads Hjson, with comments and without commas; most other tools do not."""
    said = reason.removeprefix(file).lstrip(":, ")
    strictness = Finding("J01", "file", f"is no strict JSON: {said}", "correct it")
    try:
        import hjson

        config = hjson.loads(Path(file).read_text(encoding="utf-8"))
        config = json.loads(json.dumps(config, allow_nan=False))
    except (ImportError, OSError, ValueError, RecursionError):
        return Inspection(file, None, (strictness,))
    if not isinstance(config, dict) or "lbsgd" in config or "twice" in reason:
        return Inspection(file, None, (strictness,))
    finding = Finding(
        "J02",
        "file",
        f"is no strict JSON, which DeepSpeed reads and most other tools do not: {said}",
        "correct it",
        "warning",
    )
    return Inspection(file, config, (*findings_of(config), finding))


def corrected(config: dict) -> dict:
    """The JSON with every correction of an error or a warning, until none is left; notes change nothing."""
    config = copy.deepcopy(config)
    for _ in range(10):  # one correction may bring another to light
        before = copy.deepcopy(config)
        for finding in findings_of(config):
            if finding.correction and finding.severity != "note":
                apply(config, finding.correction)
        if config == before:
            break
    return config


def apply(config: dict, correction: dict[str, Any]) -> None:
    for key, value in correction.items():
        try:
            put(config, key, None if value is DELETE else copy.deepcopy(value))
        except ConfigError:  # it lies in a block that is none, which is a finding of its own
            return


# --- on the screen ------------------------------------------------------------------------------------------------------


def check_files(files: list[str], as_json: bool = False, fix: bool = False) -> int:
    """The command behind `lbsgd check`: prints the findings; 1 if there are errors, else 0."""
    inspections = [inspect(file, fix) for given in files for file in in_folder(given)]
    num_errors = sum(inspection.count("error") for inspection in inspections)
    if as_json:
        print(
            json.dumps(
                {
                    "errors": num_errors,
                    "warnings": sum(each.count("warning") for each in inspections),
                    "files": [each.as_dict() for each in inspections],
                },
                indent=2,
            )
        )
    else:
        print_inspections(inspections)
    return int(num_errors > 0)


def in_folder(given: str) -> list[str]:
    """The JSONs in a folder and below it; a file stands for itself."""
    if not Path(given).is_dir():
        return [given]
    found = sorted(str(path) for path in Path(given).glob("**/*.json"))
    if not found:
        raise ConfigError(f"{given}: holds no .json file; name a DeepSpeed JSON, or a folder of them")
    return found


def print_inspections(inspections: list[Inspection], console=None) -> None:
    from rich.console import Console
    from rich.text import Text

    console = console or Console(highlight=False)
    for each in inspections:
        kind = "" if each.ours or each.config is None else " (plain DeepSpeed: no lbsgd block)"
        console.print(Text.assemble((plain(each.file), "bold"), (kind, "dim"), "  ", verdict(each)), soft_wrap=True)
        for change in each.fixed:
            console.print(Text.assemble("    ", ("fixed    ", "green"), plain(change)), soft_wrap=True)
        if each.findings:
            console.print(table(each.findings))
    if len(inspections) > 1:
        totals = ", ".join(
            counted(sum(each.count(severity) for each in inspections), severity) for severity in SEVERITIES
        )
        console.print(f"{len(inspections)} files: {totals}")


def verdict(inspection: Inspection) -> tuple[str, str]:
    counts = [counted(inspection.count(severity), severity) for severity in SEVERITIES if inspection.count(severity)]
    return (", ".join(counts), "") if counts else ("nothing found", "green")


def plain(text: str) -> str:
    """A file's words without what would move a terminal's cursor or has no encoding."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def table(findings: tuple[Finding, ...]):
    """Severity and code on the left; key, what and why, and the fix on the right."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for width in (2, 7, 3, None):
        grid.add_column(width=width)
    for f in findings:
        grid.add_row(
            "",
            Text(f.severity, SEVERITIES[f.severity]),
            f.code,
            Text.assemble((plain(f.key), "bold"), f" {plain(f.message)}\n", ("-> ", "green"), plain(f.fix)),
        )
    return grid
