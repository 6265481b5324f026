"""`lbsgd check --for LIBRARY`: the findings of an inspected file, with those of the library that is given it."""

from __future__ import annotations

from dataclasses import replace

from lbsgd.config.checks.clashes import RULES, InLibrary
from lbsgd.config.checks.inspection import Inspection, worst_first
from lbsgd.config.checks.rule import findings_by
from lbsgd.config.libraries.arguments import Library

AUTOMATIC = "D21"  # says that only Hugging Face fills in "auto"; the rules here know which keys


def in_library(inspection: Inspection, library: Library) -> Inspection:
    """Return an inspection with what would clash in this library."""
    if inspection.config is None:
        return inspection
    found = findings_by(RULES, InLibrary(inspection.config, library), "lbsgd" if inspection.ours else "plain")
    kept = [finding for finding in inspection.findings if finding.code != AUTOMATIC]
    return replace(inspection, findings=worst_first(kept + found))
