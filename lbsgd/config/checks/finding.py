"""Findings, which `lbsgd check` prints and which `Plan` refuses or warns of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lbsgd.errors import ConfigError

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")  # the worst first
DELETE = None  # in a correction, as in `keypath.put`: deletes the key


@dataclass(frozen=True)
class Finding:
    """One thing in a JSON that is wrong (error), doubtful (warning) or good to know (note).

    points is the top-1 error that it cost the paper. correction holds new values by key path, or DELETE, if a program
    can correct the fault.
    """

    code: str
    key: str
    message: str
    fix: str
    severity: Severity = "error"
    points: float | None = None
    correction: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        return f"{self.key} {self.message}; {self.fix} [{self.code}]"


def refuse(where: str, findings: Iterable[Finding]) -> None:
    """Raise ConfigError with one line for each error among the findings."""
    errors = [f"{where}: {finding}" for finding in findings if finding.severity == "error"]
    if errors:
        raise ConfigError(*errors)
