"""Runs that make no row, or rows that cannot be compared: each is named, and the others are still shown."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from grid_logs import DIGITS, write_log, write_rows
from resnet50 import ResNet50

from lbsgd.commands.main import main
from lbsgd.errors import ConfigError, DataError
from lbsgd.experiments.catalogue import STUDIES
from lbsgd.report.groups import find_runs, group_runs, has_diverged, with_diverged
from lbsgd.report.measure import TOP1
from lbsgd.report.paper_table import note_of_codes
from lbsgd.report.regions import update
from lbsgd.report.run_log import DIVERGED, LOG_NAME
from lbsgd.report.seeds import one_of_each_seed, require_one_code
from lbsgd.report.write import families_at, write_report
from lbsgd.train.facts import script_of

TABLE_1 = STUDIES["table1"].rows(DIGITS)
ERRORS = {row.name: [10.0, 11.0] for row in TABLE_1}


def reported(capsys, *arguments):
    code = main(["report", *map(str, arguments)])
    said = capsys.readouterr()
    return code, " ".join(said.out.split()), said.err


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_two_ends_of_one_seed_are_refused_whatever_their_order(tmp_path, order):
    places = {"a": [3.0, 2.0], "b": [3.0, 99.0]}
    logs = {place: write_log(tmp_path / place, TABLE_1[0], 0, errors) for place, errors in places.items()}
    with pytest.raises(DataError, match="one recipe and seed 0, and have finished with different numbers") as refused:
        group_runs(find_runs([tmp_path / place for place in order]))
    assert all(str(folder) in str(refused.value) for folder in logs.values())


@pytest.mark.parametrize("what, words", [("code", "different code of lbsgd"), ("script", "different recipe scripts")])
def test_a_row_of_two_codes_or_scripts_is_named_and_the_others_are_shown(tmp_path, capsys, what, words):
    write_rows(tmp_path, TABLE_1, ERRORS)
    write_log(tmp_path / "again", TABLE_1[1], 2, [10.0] * 6, **{what: "another"})
    code, out, err = reported(capsys, tmp_path, "--table", "table1")
    assert code and "Table 1, warmup" in out and "these tables lack what cannot be read: 1 error" in out
    assert "constant warmup" in out and "no warmup" not in out.split("Table 1, warmup")[1]
    assert str(tmp_path / "again") in err and words in err


def test_a_script_is_known_wherever_it_is_and_however_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("own.py", "other/own.py"):
        Path(name).write_text("class Own:\n    name = 'own'\n")

    def digest_of(argument, file):
        monkeypatch.setattr(sys, "argv", [argument])
        monkeypatch.setitem(sys.modules, "own", own := ModuleType("own"))
        own.__file__ = str(tmp_path / file)
        return script_of(type("Own", (ResNet50,), {"__module__": "own"})())

    same = {digest_of("own.py", "own.py"), digest_of(tmp_path / "own.py", "own.py"), digest_of("x", "other/own.py")}
    Path("own.py").write_text("class Own:\n    name = 'another'\n")
    assert len(same) == 1 and digest_of("own.py", "own.py") not in same


def test_rows_of_several_codes_are_noted_under_their_table(tmp_path, capsys):
    for row in TABLE_1:
        for seed in range(2):
            write_log(tmp_path, row, seed, [10.0 + seed] * 6, code="another code" if row.name == "x8" else "one code")
    note = "Run by other code of lbsgd than baseline, kn 32: gradual warmup, kn 256."
    assert note in reported(capsys, tmp_path)[1]
    page = write_report(families_at([tmp_path]), tmp_path / "report", "digits", ["table1"])[-1]
    assert note in page.read_text()
    assert f"|\n\n{note}\n" in (tmp_path / "report" / "tables.md").read_text()


def test_a_key_that_older_logs_lack_tells_rows_apart_unless_it_has_its_default(tmp_path):
    for row in TABLE_1:
        for seed, folder in enumerate((tmp_path / "old", tmp_path / "new")):
            log = write_log(folder, row, seed, [10.0] * 6, code="another" if seed else "one code") / LOG_NAME
            header, *rest = log.read_text().splitlines()
            header = json.loads(header)
            if not seed:
                del header["recipe"]["biases"]
            elif row.name == "x8":
                header["recipe"]["biases"] = {"lr_factor": 2.0}
            log.write_text("\n".join([json.dumps(header), *rest]))
    [family] = families_at([tmp_path])
    labels = [family.label(row) for row in family.rows if row.factor == 8 and row.recipe["warmup"]["kind"] == "gradual"]
    assert sorted(labels) == ["biases lr factor 2.0", "gradual warmup"]
    names = [family.label(row) for row in family.rows]
    others = sum(
        row.header["environment"]["code"] != family.rows[0].header["environment"]["code"] for row in family.rows
    )
    assert note_of_codes(names, family.rows).count(";") == others - 1 > 0  # each is noted, though names come twice


def test_a_table_without_a_baseline_says_why(tmp_path, capsys):
    write_rows(tmp_path, TABLE_1, ERRORS)
    for log in tmp_path.glob("x8*/*/log.jsonl"):
        first, *rest = log.read_text().splitlines(keepends=True)
        log.write_text("".join([json.dumps({**json.loads(first), "precision": "bf16"}) + "\n", *rest]))
    why = "No row is the baseline: that with kn 32 has precision fp32."
    code, _, err = reported(capsys, tmp_path, "--table", "table1")
    assert code == 2 and why.rstrip(".") in err
    assert why in write_report(families_at([tmp_path]), tmp_path / "report", "digits", ["table1"])[-1].read_text()
    file = tmp_path / "a.md"
    file.write_text("<!-- report . --table table1 -->\n<!-- end of report -->\n")
    with pytest.raises(ConfigError, match="a.md: no table1 can be made of these runs: it takes .*precision fp32"):
        update([file])


def test_a_table_without_the_small_batch_says_so(tmp_path, capsys):
    write_rows(tmp_path, TABLE_1[1:], ERRORS)
    said = reported(capsys, tmp_path, "--table", "table1")[2]
    assert "No row is the baseline: none has 32 images per update" in said


def log_of(name, error=10.0, finished=True, code=None, seed=0):
    header = {"recipe": {"seed": seed}, "environment": {"code": code} if code else {}}
    return SimpleNamespace(
        path=Path(name), header=header, result={} if finished else None, measures=(TOP1,), curve=lambda _: {1: error}
    )


def test_of_copies_of_a_seed_the_finished_one_counts_and_an_unfinished_one_contradicts_nothing():
    finished, begun, other = log_of("a"), log_of("b", 50.0, finished=False), log_of("c", seed=1)
    for order in ([finished, begun, other], [begun, other, finished]):
        assert one_of_each_seed(order) == [finished, other]


def test_a_log_that_does_not_know_its_code_contradicts_none():
    require_one_code([log_of("a", code="0123"), log_of("b"), log_of("c", code="0123")])


def test_a_run_that_was_started_again_and_has_finished_did_not_diverge(tmp_path):
    (tmp_path / DIVERGED).write_text("error: the loss of iteration 5 is not a number\n")
    log = tmp_path / "log.jsonl"
    assert not has_diverged(SimpleNamespace(path=log, result={}, epochs=[{}]))
    assert has_diverged(SimpleNamespace(path=log, result=None, epochs=[{}]))


def test_what_has_diverged_belongs_to_the_trial_that_ended_last_wherever_that_comes():
    for ends in ((3, 1, 2), (1, 2, 3), (2, 3, 1)):
        found = with_diverged({**{end: [f"{end}"] for end in ends}, None: ["lost"]}, lambda run: run == "lost")
        assert found == [["1"], ["2"], ["3", "lost"]]
    assert with_diverged({1: ["1"], None: ["lost", "whole"]}, lambda run: run == "lost") == [["1"], ["lost", "whole"]]
