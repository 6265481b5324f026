"""Findings: what `lbsgd check` prints, and `Plan` refuses or warns of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lbsgd.errors import ConfigError

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")  # the worst first
DELETE = None  # in a correction, as for `keypath.put`: the key goes


@dataclass(frozen=True)
class Finding:
    """One thing in a JSON that is wrong (error), doubtful (warning) or good to know (note).

    points is the top-1 error that the paper lost with it. correction holds values by key path, DELETE for none, where a
    program can mend it.
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
        raise ConfigError("\n".join(errors))
