"""`lbsgd check` against DeepSpeed: an error where DeepSpeed refuses or does not train, none where it trains.

DeepSpeed answers in separate processes (tools/deepspeed_oracle.py), and a disagreement counts only if it repeats. What
one CPU cannot answer is left out, with its reason, by deepspeed_jsons.unanswerable.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from deepspeed_jsons import BLOCKS, OPTIMIZERS, REPORTED, SCHEDULERS, jsons, unanswerable

from lbsgd.config.accepted import schema
from lbsgd.config.checks import registry
from lbsgd.config.checks.inspection import corrected, findings_of

ORACLE = Path(__file__).parent.parent / "tools" / "deepspeed_oracle.py"
SOURCES = os.environ.get("LBSGD_DEEPSPEED_SOURCES")  # a folder with deepspeed-0.16.9, -0.17.6 and -0.18.9, unpacked
PATCHES = {"0.16": "0.16.9", "0.17": "0.17.6", "0.18": "0.18.9"}


def refusals(configs, version=None):
    """Ask DeepSpeed about JSONs in one process. Return why it refuses each; "" if it trains."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if version in PATCHES:
        environment["PYTHONPATH"] = str(Path(SOURCES) / f"deepspeed-{PATCHES[version]}")
    lines = "".join(json.dumps(config) + "\n" for config in configs)
    done = subprocess.run([sys.executable, ORACLE], input=lines, env=environment, text=True, capture_output=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(configs), done.stderr[-2000:]
    return answers


def has_error(config, version=None):
    return any(finding.severity == "error" for finding in findings_of(config, version))


def disagreements(configs, answers, version=None):
    """Return the JSONs on which check and DeepSpeed disagree, asked again in a new process, and what each says."""
    found = [config for config, why in zip(configs, answers, strict=True) if bool(why) != has_error(config, version)]
    again = [(config, refusals([config], version)[0]) for config in found]
    return [said(config, why, version) for config, why in again if bool(why) != has_error(config, version)]


def said(config, why, version):
    errors = [str(finding) for finding in findings_of(config, version) if finding.severity == "error"]
    return f"{json.dumps(config)}\n  DeepSpeed: {why or 'trains'}\n  check: {errors or 'no error'}"


def answerable(number, seed):
    return [config for config in jsons(number, seed) if not unanswerable(config)]


CONFIGS = [*REPORTED, *answerable(350, seed=10)][:320]


@pytest.fixture(scope="module")
def both_answers():
    """DeepSpeed's answers to CONFIGS and to the first 30 files that --fix makes of them, from one process."""
    after = mended(CONFIGS)[:30]
    answers = refusals(CONFIGS + after)
    return answers[:320], answers[320:], after


@pytest.fixture(scope="module")
def asked(both_answers):
    """320 JSONs, and DeepSpeed's answer to each."""
    return CONFIGS, both_answers[0]


@pytest.fixture(scope="module")
def by_code():
    """For each rule, the JSONs of which it says something, by number."""
    found = defaultdict(set)
    for number, config in enumerate(CONFIGS):
        for finding in findings_of(config):
            found[finding.code].add(number)
    return found


def test_check_and_deepspeed_agree(asked):
    configs, answers = asked
    assert not (wrong := disagreements(configs, answers)), "\n".join(wrong)


def test_the_jsons_are_right_and_wrong_in_every_block(asked):
    configs, answers = asked
    assert len(configs) == 320 and 0.3 <= sum(map(bool, answers)) / 320 <= 0.7
    for block, names in (("optimizer", OPTIMIZERS), ("scheduler", SCHEDULERS)):
        kinds = Counter(str(config[block].get("type")) for config in configs if isinstance(config.get(block), dict))
        assert set(names) <= set(kinds)
    keys = {key for config in configs for key in config}
    assert {key for block in BLOCKS for key in block} <= keys


@pytest.mark.slow
def test_check_and_deepspeed_agree_on_ten_thousand():
    configs = answerable(11_000, seed=20)[:10_000]
    assert not (wrong := disagreements(configs, refusals(configs))), "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("version", PATCHES)
def test_check_and_earlier_versions_agree_on_a_thousand(version):
    assert SOURCES, "unpack the sources of 0.16.9, 0.17.6 and 0.18.9 and name the folder in LBSGD_DEEPSPEED_SOURCES"
    configs = answerable(1100, seed=30)[:1000]
    assert not (wrong := disagreements(configs, refusals(configs, version), version)), "\n".join(wrong)


def test_fix_leaves_what_deepspeed_takes_and_loses_no_number(asked, both_answers):
    """After --fix DeepSpeed takes whatever it took before, and the file still has every number."""
    for config, why in zip(*asked, strict=True):
        after = corrected(config)
        assert why or after == config
        assert after == config or numbers(config) == numbers(after), (config, after)
    _, answers, after = both_answers
    assert len(after) >= 5
    assert [said(config, why, None) for config, why in zip(after, answers, strict=True) if why] == []


def mended(configs):
    """Return the files that --fix changes into ones without an error."""
    changed = [after for config in configs if (after := corrected(config)) != config]
    return [after for after in changed if not has_error(after) and not unanswerable(after)]


def numbers(config):
    """Return all numbers in a JSON, including those in quotation marks."""
    found = Counter()
    for value in config.values():
        if isinstance(value, dict):
            found += numbers(value)
        elif isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                found[float(value)] += 1
            except ValueError:
                pass
    return found


DELETED_RULES = (
    "D01 D06 D18 D26 D29 D31 D35 D36 D45 D47 D48 D49 D70 D71 D72 D89 D92 D93 D94 D95"  # each has at least one JSON
).split()


@pytest.mark.parametrize("code", DELETED_RULES)
def test_a_rule_that_is_missing_is_noticed(asked, by_code, code, monkeypatch):
    monkeypatch.setattr(registry, "DEEPSPEED_RULES", tuple(r for r in registry.DEEPSPEED_RULES if r.code != code))
    configs, answers = asked
    assert any(bool(answers[number]) != has_error(configs[number]) for number in sorted(by_code[code]))


DELETED_ENTRIES = (
    ("keys", "gradient_clipping"),
    ("keys", "communication_data_type"),
    ("blocks", "zero_optimization"),
    ("blocks", "fp16"),
    ("torch_optimizers", "SGD"),
    ("torch_optimizers", "NAdam"),
    ("optimizers", "adamw"),
    ("schedulers", "WarmupLR"),
    ("torch_schedulers", "StepLR"),
)


@pytest.mark.parametrize("table, name", DELETED_ENTRIES, ids=lambda part: part)
def test_an_entry_that_is_missing_is_noticed(asked, table, name, monkeypatch):
    whole = schema.accepted(None)
    less = {key: value for key, value in getattr(whole, table).items() if key != name}
    assert len(less) == len(getattr(whole, table)) - 1
    monkeypatch.setattr("lbsgd.config.checks.subject.accepted", lambda _: dataclasses.replace(whole, **{table: less}))
    first_with_name = sorted(zip(*asked, strict=True), key=lambda pair: name.lower() not in str(pair[0]).lower())
    assert any(bool(why) != has_error(config) for config, why in first_with_name)
