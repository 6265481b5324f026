"""All rules, in the order of their printed findings, and the table of their codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lbsgd.config.checks import (
    block,
    clashes,
    consistency,
    deepspeed_batch,
    deepspeed_features,
    deepspeed_fp16,
    deepspeed_keys,
    deepspeed_large_batch,
    deepspeed_masters,
    deepspeed_measuring,
    deepspeed_optimizer,
    deepspeed_precision,
    deepspeed_removed,
    deepspeed_scheduler,
    deepspeed_switches,
    deepspeed_validators,
    deepspeed_values,
    deepspeed_versions,
    deepspeed_warmup,
    deepspeed_zero,
    detection,
    deviations,
    fit,
    foreign,
    rerouted,
    strictness,
)
from lbsgd.config.checks.finding import Finding
from lbsgd.config.checks.rule import Rule, findings_by, rules_of
from lbsgd.config.checks.subject import Document

CONSISTENCY = rules_of(consistency, rerouted)  # DeepSpeed's blocks against the lbsgd block
DEVIATIONS = rules_of(deviations, detection)  # from the paper's intents
DEEPSPEED_GROUPS: dict[str, tuple[Rule[Any], ...]] = {
    "Keys": (*rules_of(deepspeed_removed, deepspeed_keys), *block.NAME_RULES, *rules_of(deepspeed_versions)),
    "Values": rules_of(deepspeed_values, deepspeed_switches),
    "Values that do not go together": rules_of(deepspeed_validators, deepspeed_features),
    "Batch and gradients": rules_of(deepspeed_batch),
    "Optimizer": rules_of(deepspeed_optimizer),
    "Scheduler": rules_of(deepspeed_scheduler, deepspeed_warmup),
    "Large minibatches in plain DeepSpeed": rules_of(deepspeed_large_batch),
    "Precision": rules_of(deepspeed_fp16, deepspeed_precision, deepspeed_masters),
    "ZeRO and speed": rules_of(deepspeed_zero, deepspeed_measuring),
}
GROUPS: dict[str, tuple[Rule[Any], ...]] = {
    "The file": rules_of(strictness, foreign),
    **DEEPSPEED_GROUPS,
    "The lbsgd block by itself": block.RULES,
    "DeepSpeed's blocks against the lbsgd block": rules_of(consistency),
    "Keys that reroute gradients": rules_of(rerouted),
    "Intents that the paper measured as worse": rules_of(deviations),
    "Detectors": rules_of(detection),
    "Processes and data": (*fit.RULES, *fit.PASSES_RULES, *fit.FILE_RULES),
    "In another library (`--for`)": rules_of(clashes),
}
CODES: dict[str, Rule[Any]] = {rule.code: rule for rules in GROUPS.values() for rule in rules}
DEEPSPEED_RULES = tuple(rule for rules in DEEPSPEED_GROUPS.values() for rule in rules)


def deepspeed_findings(config: Mapping[str, Any], version: str | None = None) -> list[Finding]:
    """Return all findings about DeepSpeed's own blocks; the severity depends on the kind of JSON."""
    document = Document(config, version)
    return without_doubles(findings_by(DEEPSPEED_RULES, document, "plain" if document.plain else "lbsgd"))


def without_doubles(findings: list[Finding]) -> list[Finding]:
    """Drop what another finding about the same key says better.

    Any other error says more than a refused value (D70) or a boolean for a number (D62), and D70 more than D27 and D62.
    """
    told = {each.key for each in findings if each.severity == "error" and each.code not in ("D62", "D70")}
    kept = [each for each in findings if each.code not in ("D62", "D70") or each.key not in told]
    refused = {each.key for each in kept if each.code == "D70"}
    return [each for each in kept if each.code not in ("D27", "D62") or each.key not in refused]
