"""A grid continues with the images and the code of its earlier runs, or says in one line that it cannot."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from grid_logs import DIGITS, write_log
from tool_modules import load_tool

from lbsgd.data.coco_annotations import read_split
from lbsgd.data.folder import open_data
from lbsgd.errors import ConfigError, DataError
from lbsgd.experiments.catalogue import DATA_SETS, STUDIES
from lbsgd.experiments.checkout import NOTE, ROOT, Checkout, noted_commit
from lbsgd.experiments.reproduce import GridRequest, begin, report
from lbsgd.experiments.same_data import fingerprint_of, require_same_data
from lbsgd.train.coco_source import coco_files

ROW = STUDIES["table1"].rows(DIGITS)[0]
HERE = Checkout(ROOT, "a" * 40)


def of_data(folder, fingerprint):
    """Give a run's log the fingerprint of its images."""
    first, *rest = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    (folder / "log.jsonl").write_text("".join([json.dumps({**json.loads(first), "data": fingerprint}) + "\n", *rest]))
    return folder


def test_the_images_are_those_of_the_logs(tmp_path, digits_data):
    same = of_data(write_log(tmp_path, ROW, 0, [1.0]), open_data(digits_data).fingerprint)
    earlier = write_log(tmp_path, ROW, 1, [1.0])  # its version logged no data
    require_same_data(DIGITS, digits_data, [same, earlier, tmp_path / "not begun"], HERE)
    other = of_data(write_log(tmp_path, ROW, 2, [1.0]), "f" * 64)
    with pytest.raises(DataError, match="holds other images than .*seed2/log.jsonl was trained on .* not ffffffff"):
        require_same_data(DIGITS, digits_data, [same, other], HERE)


def test_a_detector_s_images_are_told_as_its_log_tells_them(tmp_path, monkeypatch, capsys):
    load_tool("render_scenes").render(tmp_path / "scenes", 3, 2)
    annotations = tmp_path / "scenes/annotations/instances_val.json"
    content = json.loads(annotations.read_text())
    bare = content["images"][0]["id"]  # an image without objects, which evaluation keeps
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] != bare]
    annotations.write_text(json.dumps(content))

    def run(command):
        monkeypatch.setattr(sys, "argv", command[2:])
        exec(command[2], {})  # in this process, because a new one would import all again
        return SimpleNamespace(returncode=0, stdout=capsys.readouterr().out)

    train = read_split(tmp_path / "scenes", "train")
    logged = coco_files(tmp_path, train, read_split(tmp_path / "scenes", "val", training=False), 0).fingerprint
    assert fingerprint_of(DATA_SETS["scenes"], tmp_path / "scenes", SimpleNamespace(run=run)) == logged


def test_other_images_are_refused_before_anything_is_trained(tmp_path, monkeypatch):
    data = replace(DIGITS, prepare=(), complete="", data_dir="{work_dir}")
    request = GridRequest((STUDIES["table1"],), data, (0, 1), tmp_path, tmp_path / "results")
    of_data(write_log(request.logs, ROW, 0, [1.0]), "f" * 64)
    monkeypatch.setattr("lbsgd.experiments.reproduce.open_checkout", lambda *places: HERE)
    monkeypatch.setattr("lbsgd.experiments.same_data.fingerprint_of", lambda *folder: "0" * 64)
    with pytest.raises(DataError, match="holds other images"):
        begin(request)


def test_a_warning_says_where_the_images_cannot_be_told(tmp_path, capsys):
    known = of_data(write_log(tmp_path, ROW, 0, [1.0]), "f" * 64)
    require_same_data(DIGITS, tmp_path, [known], HERE)
    assert "warning: whether" in capsys.readouterr().out


def test_two_rows_of_one_name_are_refused_and_none_is_lost(tmp_path):
    request = GridRequest((STUDIES["table1"],), DIGITS, (0, 1), tmp_path, tmp_path / "results")
    for seed in (0, 1):
        of_data(write_log(request.logs, ROW, seed, [1.0]), str(seed) * 64)
    with pytest.raises(DataError, match="x1/seed0/log.jsonl and .*x1/seed1/log.jsonl are of one row by their folders"):
        report(request, "abc")


@pytest.mark.parametrize("note", [None, '{"commit": 5}', '{"commit": ""}', '{"commit": null}', "[]"])
def test_published_runs_without_a_commit_are_not_given_another(tmp_path, note):
    assert noted_commit(tmp_path) is None  # nothing is published yet
    write_log(tmp_path / "runs", ROW, 0, [1.0])
    if note is not None:
        (tmp_path / NOTE).write_text(note)
    with pytest.raises(ConfigError, match="grid.json does not say the commit of the runs beside it"):
        noted_commit(tmp_path)
