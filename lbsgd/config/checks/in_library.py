"""`lbsgd check --for LIBRARY`: the findings of an inspected file, with those of the library that is given it."""

from __future__ import annotations

from dataclasses import replace

from lbsgd.config.checks import clashes
from lbsgd.config.checks.clashes import InLibrary
from lbsgd.config.checks.finding import Finding
from lbsgd.config.checks.inspection import IN_PYTHON, Inspection, worst_first
from lbsgd.config.checks.rule import findings_by, rules_of
from lbsgd.config.libraries.arguments import Library

CASTS_BY_POSITION = "D94"
AUTOMATIC = "D21"  # says that only Hugging Face fills in "auto"; the rules here know which keys
WRITTEN_BY_LIGHTNING = ("D08", "D49")  # it writes clipping and micro batch where they are left out


def in_library(inspection: Inspection, library: Library) -> Inspection:
    """Return an inspection with what would clash in this library."""
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
    """Return a finding as it is for a network that gets its inputs by keyword, as the Trainer of transformers does."""
    if library != "transformers" or finding.code != CASTS_BY_POSITION:
        return finding
    return replace(finding, message=f"{finding.message}; the Trainer gives them by keyword", severity="note")


def read_by(library: Library, finding: Finding) -> Finding:
    """Return a finding as it is in a library: all but DeepSpeed itself read the file with Python's json."""
    if library == "deepspeed" or not finding.message.endswith(IN_PYTHON):
        return finding
    return replace(finding, message=finding.message.removesuffix(IN_PYTHON), severity="error")
