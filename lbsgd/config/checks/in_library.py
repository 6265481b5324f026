"""`lbsgd check --for LIBRARY`: the findings of an inspected file, adapted to the library that reads it."""

from __future__ import annotations

from dataclasses import replace

from lbsgd.config.checks import clashes
from lbsgd.config.checks.clashes import InLibrary
from lbsgd.config.checks.finding import Finding
from lbsgd.config.checks.inspection import IN_PYTHON, Inspection, worst_first
from lbsgd.config.checks.rule import findings_by, rules_of
from lbsgd.config.libraries.arguments import Library

CASTS_BY_POSITION = "D94"
AUTOMATIC = "D21"  # says that only Hugging Face fills in "auto"; the library's rules know which keys
WRITTEN_BY_LIGHTNING = ("D08", "D49")  # Lightning writes clipping and micro batch if they are left out


def in_library(inspection: Inspection, library: Library) -> Inspection:
    """Return an inspection with the findings that apply in this library."""
    if inspection.config is None:
        return inspection
    found = findings_by(
        rules_of(clashes), InLibrary(inspection.config, library), "lbsgd" if inspection.ours else "plain"
    )
    written = WRITTEN_BY_LIGHTNING if library == "lightning" and not inspection.ours else ()
    kept = [
        given_by(library, read_by(library, finding))
        for finding in inspection.findings
        if finding.code != AUTOMATIC and not (finding.code in written and finding.key not in inspection.config)
    ]
    return replace(inspection, findings=worst_first(kept + found))


def given_by(library: Library, finding: Finding) -> Finding:
    """Return a finding, adapted to transformers' Trainer, which gives the network its inputs by keyword."""
    if library != "transformers" or finding.code != CASTS_BY_POSITION:
        return finding
    return replace(finding, message=f"{finding.message}; the Trainer gives them by keyword", severity="note")


def read_by(library: Library, finding: Finding) -> Finding:
    """Return a finding, adapted to the library's parser: all but DeepSpeed itself use Python's json."""
    if library == "deepspeed" or not finding.message.endswith(IN_PYTHON):
        return finding
    return replace(finding, message=finding.message.removesuffix(IN_PYTHON), severity="error")
