"""Rules: each has a code, a function that looks for one fault, and the page that `lbsgd check --explain` prints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Generic, Literal, TypeVar

from lbsgd.config.checks.finding import Finding, Severity

Kind = Literal["lbsgd", "plain"]  # of a JSON: with an lbsgd block or without
Subject = TypeVar("Subject")


@dataclass(frozen=True)
class Hit:
    """One place where a rule is broken; the rule adds code and severity, and its own fix if the hit has none."""

    key: str
    message: str
    fix: str | None = None
    correction: Mapping[str, Any] | None = None
    points: float | None = None


@dataclass(frozen=True)
class Rule(Generic[Subject]):
    """One rule: its code, its severity in each kind of JSON (None: it does not apply), and the reason for it.

    example triggers this rule and no other. It is a JSON merge patch (null deletes) for ds_configs/8k.json if the rule
    applies to JSONs with an lbsgd block, else for a plain JSON without findings; or it is the text of a whole file.
    processes and version (of DeepSpeed; None is the newest) are those with which the example triggers the rule.
    """

    code: str
    title: str
    lbsgd: Severity | None
    plain: Severity | None
    why: str
    fix: str
    example: Mapping[str, Any] | str
    processes: int
    version: str | None
    look: Callable[[Subject], Iterable[Hit]]

    def severity(self, kind: Kind) -> Severity | None:
        return self.lbsgd if kind == "lbsgd" else self.plain

    def findings(self, subject: Subject, kind: Kind) -> Iterable[Finding]:
        """Yield a finding for every hit, or none if the rule does not apply to this kind of JSON."""
        severity = self.severity(kind)
        if severity is None:
            return
        for hit in self.look(subject):
            fix = self.fix if hit.fix is None else hit.fix
            yield Finding(self.code, hit.key, hit.message, fix, severity, hit.points, hit.correction)


def rule(
    code: str,
    title: str,
    *,
    lbsgd: Severity | None = None,
    plain: Severity | None = None,
    why: str,
    fix: str,
    example: Mapping[str, Any] | str,
    processes: int = 1,
    version: str | None = None,
) -> Callable[[Callable[[Subject], Iterable[Hit]]], Rule[Subject]]:
    """Make a rule of the decorated function, which yields a hit for each place where the rule is broken."""

    def declare(look: Callable[[Subject], Iterable[Hit]]) -> Rule[Subject]:
        return Rule(code, title, lbsgd, plain, why, fix, example, processes, version, look)

    return declare


def rules_of(*modules: ModuleType) -> tuple[Rule[Any], ...]:
    """Return the rules that the modules define, in order."""
    return tuple(value for module in modules for value in vars(module).values() if isinstance(value, Rule))


def findings_by(rules: Iterable[Rule[Subject]], subject: Subject, kind: Kind = "lbsgd") -> list[Finding]:
    """Return the findings of all rules about one subject."""
    return [finding for each in rules for finding in each.findings(subject, kind)]
