"""The codes of `lbsgd check`: each is unique, documented, and triggered by its own example only."""

import copy
import importlib
import pkgutil
from pathlib import Path

import pytest

import lbsgd.config.checks
import lbsgd.config.libraries
from lbsgd.commands.main import main
from lbsgd.config.checks import explain, fit
from lbsgd.config.checks.block import parse_recipe
from lbsgd.config.checks.inspection import findings_of, inspect
from lbsgd.config.checks.registry import CODES, GROUPS
from lbsgd.config.checks.rule import Rule, findings_by
from lbsgd.config.checks.subject import Planned
from lbsgd.config.json_file import read_json

ROOT = Path(__file__).parent.parent
EIGHT_K = read_json(ROOT / "ds_configs/8k.json")
PLAIN = {"train_batch_size": 256, "gradient_clipping": 0.0, "timers": {"throughput": {"enabled": False}}}
ALWAYS = {code: rule for code, rule in CODES.items() if code[0] != "L"}  # the others: tests/test_library_configs.py


def merged(config, patch):
    """Return the result of a JSON merge patch: blocks are merged, None deletes."""
    result = copy.deepcopy(config)
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            inner = result.get(key)
            result[key] = merged(inner if isinstance(inner, dict) else {}, value)
        else:
            result[key] = value
    return result


def all_findings(config, processes=1, version=None):
    """All findings of check and plan for a JSON on this many processes."""
    findings = list(findings_of(config, version))
    if processes > 1:
        planned = Planned(config, parse_recipe("example", config), processes)
        findings += findings_by(fit.RULES + fit.PASSES_RULES, planned)
    return findings


def found(config, processes=1, version=None):
    """The codes of all_findings."""
    return {finding.code for finding in all_findings(config, processes, version)}


def test_a_code_has_one_rule_and_every_rule_is_registered():
    registered = [rule for rules in GROUPS.values() for rule in rules]
    assert len(CODES) == len(registered)
    written = []
    for module in (
        *pkgutil.iter_modules(lbsgd.config.checks.__path__, "lbsgd.config.checks."),
        *pkgutil.iter_modules(lbsgd.config.libraries.__path__, "lbsgd.config.libraries."),
    ):
        things = vars(importlib.import_module(module.name)).values()
        written += [thing for thing in things if isinstance(thing, Rule) and thing.look.__module__ == module.name]
    assert sorted(rule.code for rule in written) == sorted(CODES)


def test_only_a_rule_makes_a_finding():
    """So every finding has the code of a registered rule."""
    makers = [path.name for path in (ROOT / "lbsgd").rglob("*.py") if " Finding(" in path.read_text()]
    assert makers == ["rule.py"]


@pytest.mark.parametrize("rule", ALWAYS.values(), ids=ALWAYS)
def test_an_example_triggers_its_code_and_no_other(rule, tmp_path, monkeypatch):
    monkeypatch.setattr("lbsgd.config.checks.deepspeed_validators.installed", lambda _: "2.11.0")  # of torch
    if isinstance(rule.example, str):
        (tmp_path / "example.json").write_text(rule.example)
        assert [finding.code for finding in inspect(str(tmp_path / "example.json")).findings] == [rule.code]
    elif rule.lbsgd:
        assert found(merged(EIGHT_K, rule.example), rule.processes, rule.version) == {rule.code}
    else:  # every plain optimizer block also brings the note D55
        assert found(merged(PLAIN, rule.example), version=rule.version) - ({"D55"} - {rule.code}) == {rule.code}


@pytest.mark.parametrize(
    "rule",
    [rule for rule in ALWAYS.values() if rule.lbsgd and rule.plain and not isinstance(rule.example, str)],
    ids=lambda rule: rule.code,
)
def test_a_rule_for_either_kind_of_json_has_its_severity_in_each(rule):
    with_block = merged(EIGHT_K, rule.example)
    without = {key: value for key, value in with_block.items() if key != "lbsgd"}
    if rule.code == "D17":  # stage 3 is right in plain DeepSpeed
        without["zero_optimization"]["stage"] = 4
    for config, severity in ((with_block, rule.lbsgd), (without, rule.plain)):
        assert {f.severity for f in findings_of(config, rule.version) if f.code == rule.code} == {severity}


@pytest.mark.parametrize("rule", CODES.values(), ids=CODES)
def test_every_entry_says_what_why_and_how(rule):
    assert rule.lbsgd or rule.plain
    assert rule.why.endswith(".") and len(rule.why) > 40
    assert rule.fix and not rule.fix.endswith(".") and rule.title and not rule.title.endswith(".")


VERBS = "is has was takes stands makes holds rounds keeps moves changes expects updates works would".split()


@pytest.mark.parametrize("rule", ALWAYS.values(), ids=ALWAYS)
def test_a_message_goes_on_after_its_key_with_a_verb(rule, tmp_path):
    if isinstance(rule.example, str):
        (tmp_path / "example.json").write_text(rule.example)
        findings = inspect(str(tmp_path / "example.json")).findings
    else:
        config = merged(EIGHT_K if rule.lbsgd else PLAIN, rule.example)
        findings = all_findings(config, rule.processes, rule.version)
    assert {each.message.split()[0] for each in findings if each.code == rule.code} <= set(VERBS)


def test_the_page_of_codes_is_current():
    assert (ROOT / "docs/checks.md").read_text() == explain.markdown()


def test_a_code_is_explained(capsys):
    assert main(["check", "--explain", "D12"]) == 0
    entry = capsys.readouterr().out
    assert all(word in entry for word in ("D12", "auto_cast", "warning with an lbsgd block", "why", "example", "fix"))
    assert main(["check", "--explain", "d12"]) == 0 and capsys.readouterr().out == entry


def test_all_codes_are_explained(capsys):
    assert main(["check", "--explain", "all"]) == 0
    entries = capsys.readouterr().out
    assert all(f"{code}  " in entries for code in CODES)
    assert main(["check", "--explain", "all", "--markdown"]) == 0
    assert capsys.readouterr().out == (ROOT / "docs/checks.md").read_text()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--explain", "D999"], ["D999", "no such code", "D98"]),
        (["--explain", "nonsense"], ["nonsense", "no such code", "--explain all"]),
        (["--explain", "D12", "--markdown"], ["--explain all"]),
        ([], ["name a DeepSpeed JSON"]),
    ],
)
def test_a_wrong_code_is_one_line_and_exit_code_2(arguments, words, capsys):
    assert main(["check", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(word in said for word in words)
