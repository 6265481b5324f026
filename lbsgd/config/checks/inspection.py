"""Inspect DeepSpeed JSONs, with an lbsgd block or without: find all faults, and correct those that a program can."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lbsgd.config.checks import fit, strictness
from lbsgd.config.checks.block import recipe_or_findings
from lbsgd.config.checks.finding import SEVERITIES, Finding, Severity
from lbsgd.config.checks.foreign import foreign_findings
from lbsgd.config.checks.recognise import is_deepspeed_json
from lbsgd.config.checks.registry import CONSISTENCY, DEVIATIONS, deepspeed_findings, without_doubles
from lbsgd.config.checks.rule import Kind, findings_by, rules_of
from lbsgd.config.checks.strictness import UnstrictFile
from lbsgd.config.checks.subject import Planned
from lbsgd.config.json_file import (
    RepeatedKeyError,
    keep_original,
    parse_json,
    read_text,
    text_of,
    without_repetition,
    write_values,
)
from lbsgd.config.keypath import differences, is_same, put, shown
from lbsgd.config.schema import Recipe
from lbsgd.disk import require_shallow
from lbsgd.errors import ConfigError

IN_PYTHON = ", in a program that reads the file with Python's json"  # DeepSpeed reads it with hjson


@dataclass(frozen=True)
class Inspection:
    """A file with its findings, the worst first; config is None if the file is unreadable.

    fixed: the lines that --fix changed. kept: the path of the copy of the original file.
    """

    file: str
    config: Mapping[str, Any] | None
    findings: tuple[Finding, ...]
    fixed: tuple[str, ...] = ()
    kept: str | None = None
    version: str | None = None  # DeepSpeed's; None is the installed one

    @property
    def ours(self) -> bool:
        """Whether the file has an lbsgd block."""
        return self.config is not None and "lbsgd" in self.config

    def count(self, severity: Severity) -> int:
        """Return the number of findings of one severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Return the inspection as plain data, without the file's content."""
        keys = ("severity", "code", "key", "message", "fix", "points")
        findings = [{key: getattr(finding, key) for key in keys} for finding in self.findings]
        return {
            "file": self.file,
            "lbsgd_block": self.ours,
            "fixed": list(self.fixed),
            "kept": self.kept,
            "findings": findings,
        }


def findings_of(config: Mapping[str, Any], version: str | None = None) -> tuple[Finding, ...]:
    """Return all findings about a parsed JSON, with an `lbsgd` block or without, the worst first."""
    found = our_findings(config, version) if "lbsgd" in config else deepspeed_findings(config, version)
    return worst_first(found)


def findings_of_file(config: Mapping[str, Any], version: str | None) -> tuple[Finding, ...]:
    """Return all findings about a JSON file, which plain DeepSpeed reads as Hjson.

    Hjson turns 5.0 into 5. An error about 5.0 alone becomes a warning, because it is an error only in a program that
    reads the file with Python's json, such as Hugging Face's Trainer.
    """
    found, as_read = findings_of(config, version), as_hjson(config)
    if "lbsgd" in config or is_same(as_read, config):
        return found
    read = findings_of(as_read, version)
    alone = {(finding.code, finding.key) for finding in found if finding.severity == "error"}
    alone -= {(finding.code, finding.key) for finding in read}
    doubtful = [
        replace(finding, message=finding.message + IN_PYTHON, severity="warning")
        for finding in found
        if (finding.code, finding.key) in alone
    ]
    return worst_first([*read, *doubtful])


def as_hjson(value: Any) -> Any:
    """Return a JSON value as hjson reads it: whole numbers below 10^10 become ints, however they are written."""
    if isinstance(value, dict):
        return {key: as_hjson(each) for key, each in value.items()}
    if isinstance(value, list):
        return [as_hjson(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e10 else value


def our_findings(config: Mapping[str, Any], version: str | None) -> list[Finding]:
    """Return everything that `Plan.read` would refuse or warn of, on any number of processes."""
    found, parsed = deepspeed_findings(config, version), recipe_or_findings(config)
    if not isinstance(parsed, Recipe):
        return found + parsed
    if any(finding.code == "D04" for finding in found):  # without batch sizes there is nothing to compare
        return found
    rules = (*CONSISTENCY, *DEVIATIONS, *fit.RULES, *fit.FILE_RULES)
    return without_doubles(found + findings_by(rules, Planned(config, parsed)))


def worst_first(findings: list[Finding]) -> tuple[Finding, ...]:
    """Sort findings by severity, and keep their order otherwise."""
    return tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))


def inspect(file: str, fix: bool = False, version: str | None = None) -> Inspection:
    """Read and check a file for a version of DeepSpeed; with fix, write the corrections that a program can make."""
    try:
        text = read_text(file)
        config = parse_json(file, text)
    except ConfigError as error:
        return inspect_unstrict(file, error, fix, version)
    if foreign := foreign_findings(text, config):
        return Inspection(file, None, foreign, version=version)
    if not fix or not is_deepspeed_json(config):
        return Inspection(file, config, findings_of_file(config, version), version=version)
    mended = corrected(config, version)
    changes, kept = differences(config, mended, written=shown), None
    if changes:
        kept = str(keep_original(file, text.encode()))
        write_values(file, text, mended)
    return Inspection(file, mended, findings_of_file(mended, version), changes, kept, version)


def inspect_unstrict(file: str, error: ConfigError, fix: bool, version: str | None) -> Inspection:
    """Check a file that is not strict JSON. DeepSpeed reads Hjson; we accept it only without an lbsgd block.

    Nothing is written back, even with fix, because comments would be lost.
    """
    try:
        config = None if isinstance(error, RepeatedKeyError) else read_hjson(file)
    except RepeatedKeyError as repeated:
        config, error = None, repeated
    if foreign := foreign_findings(text_if_there(file), config):
        return Inspection(file, None, foreign, version=version)
    if config is not None and "lbsgd" in config:
        config = None
    kind: Kind = "lbsgd" if config is None else "plain"
    problem, _, advice = str(error).removeprefix(file).lstrip(":, ").rpartition("; ")
    if fix:
        advice += ", and then run --fix again: it changes strict JSON only, because comments would be lost"
    found = findings_by(rules_of(strictness), UnstrictFile(problem, advice, readable=config is not None), kind)
    about = findings_of(config, version) if config is not None else ()
    return Inspection(file, config, (*about, *found), version=version)


def text_if_there(file: str) -> str:
    """Return a file's text, or "" if it cannot be read."""
    try:
        return text_of(file)
    except (OSError, UnicodeDecodeError):
        return ""


def read_hjson(file: str) -> dict[str, Any] | None:
    """Return the object in an Hjson file; None if it holds none or if hjson, which DeepSpeed brings, is missing.

    Raises RepeatedKeyError if an object has a key twice, which DeepSpeed refuses.
    """
    try:
        import hjson

        text = text_of(file)
        config = hjson.loads(text, object_pairs_hook=without_repetition)
        if not config and "{" not in text:
            return None  # only hjson takes a file of nothing but comments for an empty object
        require_shallow(config)
        config = json.loads(json.dumps(config, allow_nan=False))
    except RepeatedKeyError:
        raise
    except (ImportError, OSError, ValueError, OverflowError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def corrected(config: Mapping[str, Any], version: str | None = None) -> dict[str, Any]:
    """Return the JSON with every unambiguous correction applied, until none is left.

    With an lbsgd block, which states the intent, errors and warnings are corrected. Without one only errors are:
    values that DeepSpeed takes do not change, and a correction keeps all numbers.
    """
    mended = copy.deepcopy(dict(config))
    severities = ("error", "warning") if "lbsgd" in config else ("error",)
    for _ in range(10):  # one correction may reveal another
        before = copy.deepcopy(mended)
        for finding in findings_of(mended, version):
            if finding.correction and finding.severity in severities:
                apply(mended, finding.correction)
        if mended == before:
            break
    return mended


def apply(config: dict[str, Any], correction: Mapping[str, Any]) -> None:
    """Put a correction's values into a JSON, up to the first that has no block to go into."""
    for key, value in correction.items():
        try:
            put(config, key, copy.deepcopy(value))
        except ConfigError:  # the path runs through a value that is not a block, which is another finding
            return
