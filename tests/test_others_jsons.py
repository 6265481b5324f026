"""`lbsgd check` on DeepSpeed JSONs as other projects have them: what is said is true, and what hurts is said."""

import json

from lbsgd.commands.main import main

SGD = {
    "train_batch_size": 8192,
    "gradient_clipping": 0.0,
    "timers": {"throughput": {"enabled": False}},
    "optimizer": {"type": "SGD", "params": {"lr": 3.2, "momentum": 0.9}},
}
ADAM = {**SGD, "optimizer": {"type": "AdamW", "params": {"lr": 0.001}}}


def test_a_table_of_versions_breaks_its_lines_between_words_on_a_terminal(tmp_path, capsys, monkeypatch):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**ADAM, "zero_optimization": {"stage": 1, "stage3_param_persitence_threshold": 10}}))
    arguments = ["check", "--deepspeed", "0.18..0.19", str(path)]
    assert main(arguments) == 1
    piped = capsys.readouterr().out.splitlines()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    assert main(arguments) == 1
    shown = capsys.readouterr().out.splitlines()
    assert max(map(len, piped)) > 100 and max(map(len, shown[1:])) <= 60
    assert " ".join(shown).split() == " ".join(piped).split()


def test_a_file_is_checked_once_under_however_many_names(tmp_path, capsys):
    inner = tmp_path / "inner"
    inner.mkdir()
    for name, config in (("a", ADAM), ("b", ADAM), ("other", {"name": "x"})):
        (inner / f"{name}.json").write_text(json.dumps(config))
    (tmp_path / "link.json").symlink_to(inner / "a.json")
    (inner / "empty.json").touch()
    names = [inner / "b.json", tmp_path, inner, inner / "a.json"]
    assert main(["check", *map(str, names)]) == 0
    out, err = capsys.readouterr()
    assert "2 files: 0 errors" in out and "1 other JSON passed over" in out and err.count("is empty") == 1
    assert out.index("inner/b.json") < out.index("inner/a.json") and "link.json" not in out
