"""`lbsgd check --for LIBRARY`: the findings of an inspected file, with those of the library that is given it."""

from __future__ import annotations

from dataclasses import replace

from lbsgd.config.checks.clashes import RULES, InLibrary
from lbsgd.config.checks.finding import Finding
from lbsgd.config.checks.inspection import IN_PYTHON, Inspection, worst_first
from lbsgd.config.checks.rule import findings_by
from lbsgd.config.libraries.arguments import Library

AUTOMATIC = "D21"  # says that only Hugging Face fills in "auto"; the rules here know which keys


def in_library(inspection: Inspection, library: Library) -> Inspection:
    """Return an inspection with what would clash in this library."""
    if inspection.config is None:
        return inspection
    found = findings_by(RULES, InLibrary(inspection.config, library), "lbsgd" if inspection.ours else "plain")
    kept = [read_by(library, finding) for finding in inspection.findings if finding.code != AUTOMATIC]
    return replace(inspection, findings=worst_first(kept + found))


def read_by(library: Library, finding: Finding) -> Finding:
    """Return a finding as it is in a library: all but DeepSpeed itself read the file with Python's json."""
    if library == "deepspeed" or not finding.message.endswith(IN_PYTHON):
        return finding
    return replace(finding, message=finding.message.removesuffix(IN_PYTHON), severity="error")
