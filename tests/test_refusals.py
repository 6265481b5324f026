"""Refusals of the recipe: one line that says what is wrong, where, and what to do; exit code 2, nothing half-done."""

import json
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import DIGITS, LAUNCHER, RECIPE, ROOT, command, recipe, refused, script

from lbsgd.config.json_file import read_json
from lbsgd.data import beton, beton_format


def test_without_data_one_line_says_what_was_looked_for_and_what_to_run(tmp_path):
    looked_for = tmp_path / "nothing"
    refused(recipe(DIGITS, "--data_dir", looked_for), looked_for, "train.beton", "lbsgd convert")
    refused(recipe(DIGITS, IMAGENET_FFCV_DIR=str(looked_for)), looked_for)
    (tmp_path / "empty").mkdir()
    refused(recipe(DIGITS, "--data_dir", tmp_path / "empty"), tmp_path / "empty", "train.beton")


def test_the_converter_without_a_source_says_what_was_looked_for(tmp_path):
    converter = [sys.executable, "tools/convert_imagenet_to_ffcv.py"]
    refused(
        command(*converter, "--data_dir", tmp_path / "out", IMAGENET_DIR=str(tmp_path / "jpegs")), tmp_path / "jpegs"
    )
    assert not (tmp_path / "out").exists()


@pytest.fixture
def spoilt(digits_data, tmp_path):
    """A copy of the digits' data folder that a test may damage."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train.beton", "val.beton", "manifest.json"):
        (folder / name).write_bytes((Path(digits_data) / name).read_bytes())
    return folder


def test_a_file_that_is_not_ffcvs_is_refused(spoilt):
    (spoilt / "train.beton").write_bytes(b"\xff\xd8\xff\xe0 a JPEG" * 1000)
    refused(recipe(DIGITS, "--data_dir", spoilt), spoilt / "train.beton")


@pytest.mark.parametrize("missing_bytes", [1, 1000, 500_000])
def test_a_truncated_file_is_refused(spoilt, missing_bytes):
    path = spoilt / "train.beton"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - missing_bytes)
    refused(recipe(DIGITS, "--data_dir", spoilt), path)


def with_labels(path, change):
    """Rewrite the label column of an FFCV file in place."""
    labels = beton.BetonFile.open(path).labels
    header = np.fromfile(path, dtype=beton_format.HEADER, count=1)[0]
    record = np.dtype([("image", beton_format.IMAGE), ("label", beton_format.LABEL)], align=True)
    table = np.memmap(
        path,
        dtype=record,
        mode="r+",
        shape=(int(header["num_images"]),),
        offset=beton_format.HEADER.itemsize + 2 * beton_format.FIELD.itemsize,
    )
    assert (table["label"] == labels).all()
    table["label"] = change(labels.copy())
    table.flush()


def test_a_label_outside_the_classes_is_refused(spoilt):
    def one_wrong(labels):
        labels[7] = 10
        return labels

    (spoilt / "manifest.json").unlink()
    with_labels(spoilt / "val.beton", one_wrong)
    refused(recipe(DIGITS, "--data_dir", spoilt), "val.beton", "7", "10")


def test_a_validation_set_of_another_data_set_is_refused(spoilt):
    (spoilt / "val.beton").write_bytes((spoilt / "train.beton").read_bytes())
    refused(recipe(DIGITS, "--data_dir", spoilt), "val.beton", "manifest.json")


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"train_batch_size": 128,}', ["line 1"]),
        (None, ["train_batch_sise", "did you mean train_batch_size"]),
    ],
)
def test_a_json_that_does_not_parse_or_has_a_typo_is_refused(tmp_path, text, words):
    config = read_json(DIGITS)
    config["train_batch_sise"] = 128
    path = tmp_path / "typo.json"
    path.write_text(text or json.dumps(config))
    refused(recipe(path, "--fake_data"), path, *words)


def test_a_json_that_disagrees_with_itself_is_refused_with_both_numbers(tmp_path):
    config = read_json(DIGITS)
    config["optimizer"]["params"]["lr"] = 0.4
    path = tmp_path / "disagrees.json"
    path.write_text(json.dumps(config))
    refused(recipe(path, "--fake_data"), "optimizer.params.lr", "is 0.4", "makes it 0.05")


def test_a_port_that_is_taken_is_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = recipe(
            DIGITS,
            "--fake_data",
            "--output_dir",
            tmp_path,
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(taken.getsockname()[1]),
        )
    refused(done, "--master_port")


def test_fewer_images_than_one_global_batch_are_refused(digits_data):
    refused(recipe(ROOT / "ds_configs/8k.json", "--data_dir", digits_data), "8192", "1437", "--global_batch")


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    refused(recipe(DIGITS, "--fake_data", "--output_dir", tmp_path / "file" / "run"), tmp_path / "file" / "run")


def test_an_unexpected_number_of_processes_is_refused():
    refused(recipe(DIGITS, "--fake_data", "--expect_world_size", 256), "256", "the world size is 1")


OWN_NORM = """
from digits import DigitsResNet
from torch import nn

from lbsgd.commands.train import main


class OwnNorm(nn.BatchNorm2d):
    pass


class Own(DigitsResNet):
    def network(self, num_classes, plan):
        return nn.Sequential(nn.Conv2d(3, 3, 1), OwnNorm(3), super().network(num_classes, plan))


main(Own(), "")
"""


def test_a_network_with_a_batch_norm_of_an_unknown_class_is_refused(tmp_path):
    (tmp_path / "own.py").write_text(OWN_NORM)
    done = script(tmp_path / "own.py", "--deepspeed_config", DIGITS, "--fake_data", "--output_dir", tmp_path / "run")
    refused(done, "digits: 1 is a OwnNorm, neither torch's own batch norm nor timm's")


def test_a_missing_hostfile_is_refused_and_no_rank_hangs(tmp_path):
    """DeepSpeed itself only warns, and would train on one host."""
    done = command(
        LAUNCHER,
        "--hostfile",
        tmp_path / "hosts",
        "--num_accelerators",
        2,
        RECIPE,
        "--deepspeed_config",
        ROOT / "ds_configs/8k.json",
        "--fake_data",
    )
    refused(done, tmp_path / "hosts", "does not exist")


def test_a_flag_that_is_no_number_is_refused():
    done = recipe(DIGITS, "--micro_batch", "many")
    assert done.returncode == 2 and "'many' is not a whole number" in done.stderr


@pytest.mark.parametrize("flag, most", [("--epochs", 8), ("--max_iterations", 88)])
def test_a_flag_that_ends_earlier_cannot_end_later(tmp_path, flag, most):
    refused(recipe(DIGITS, "--fake_data", flag, most + 1, "--output_dir", tmp_path), flag, most + 1, "lbsgd.decay")
