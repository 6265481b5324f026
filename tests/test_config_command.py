"""`lbsgd config` writes nothing that `lbsgd check` refuses, prints warnings, and resolves no contradiction."""

import itertools
import json
import shlex
from pathlib import Path

import pytest

from lbsgd.commands.config import generated
from lbsgd.commands.main import main
from lbsgd.config.checks.inspection import findings_of
from lbsgd.config.libraries.arguments import LIBRARIES
from lbsgd.config.libraries.needs import needs_of
from lbsgd.config.plan import Plan
from lbsgd.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "ds_configs"
EIGHT_K = CONFIGS / "8k.json"


def config(arguments, capsys):
    """Run the command. Return its exit code, its output, and the lines on stderr."""
    code = main(["config", *shlex.split(arguments)])
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


# --- what check would say ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, code",
    [
        ("--detection --global_batch 16 --precision fp16", "M01"),
        ("--detection --global_batch 16 --set lbsgd.batch_norm.scope=all", "M05"),
        ("--detection --global_batch 16 --set lbsgd.batch_norm.zero_last_gamma=false", "M05"),
        ("--detection --global_batch 16 --set lbsgd.augmentation.resolution=512", "M06"),
        ("--detection --global_batch 16 --set lbsgd.augmentation.crop_scale=[0.5,1.0]", "M06"),
    ],
)
def test_what_check_calls_an_error_is_not_written(tmp_path, capsys, arguments, code):
    refused, out, [error] = config(f"{arguments} --output {tmp_path / 'd.json'}", capsys)
    assert refused == 2 and out == "" and error.startswith("error: lbsgd config: ") and error.endswith(f"[{code}]")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, codes",
    [
        ("--global_batch 8192 --set lbsgd.decay.epochs=[90]", ["F06"]),
        ("--global_batch 16384", ["R20"]),
        ("--global_batch 8192 --set my_project=1", ["D03"]),
        ("--detection --global_batch 256", ["M03"]),
        ("--global_batch 8192", []),
    ],
)
def test_what_check_warns_of_stands_on_stderr_and_the_json_alone_on_stdout(tmp_path, capsys, arguments, codes):
    code, out, warnings = config(arguments, capsys)
    assert code == 0 and [line[-5:] for line in warnings] == [f"[{code}]"[-5:] for code in codes]
    assert all(line.startswith("warning: ") for line in warnings)
    found = [str(each) for each in findings_of(json.loads(out)) if each.severity == "warning"]
    assert warnings == [f"warning: {each}" for each in found]
    code, out, again = config(f"{arguments} --output {tmp_path / 'a.json'}", capsys)
    assert code == 0 and again == warnings and "warning" not in out


def test_what_follows_the_length_of_the_run_is_told_in_one_line(capsys):
    code, out, beside = config("--global_batch 8192 --gpus 8 --precision bf16 --epochs 18", capsys)
    assert code == 0 and json.loads(out)["lbsgd"]["epochs"] == 18
    assert beside == ["scaled from the paper's 90 epochs: lbsgd.warmup.epochs 1, lbsgd.decay.epochs [6, 12, 16]"]
    _, _, beside = config("--global_batch 256 --epochs 18", capsys)  # this batch needs no warmup
    assert beside == ["scaled from the paper's 90 epochs: lbsgd.decay.epochs [6, 12, 16]"]


def test_a_file_from_another_says_what_changed_and_what_is_doubtful_as_comments_beside_the_call(capsys):
    code, out, beside = config(f"--from {EIGHT_K} --for transformers --gpus 8 --epochs 40", capsys)
    assert code == 0 and json.loads(out)["lbsgd"]["epochs"] == 40
    assert "# changed: lbsgd.epochs: 90 -> 40" in beside
    [warning] = [line for line in beside if line.startswith("# warning: ")]
    assert "lbsgd.decay.epochs" in warning and "[F06]" in warning
    eval("\n".join(beside), {"TrainingArguments": dict, "__builtins__": {}})  # it can still be pasted


def test_with_an_output_file_they_stay_on_stderr(tmp_path, capsys):
    arguments = f"--from {EIGHT_K} --for deepspeed --gpus 8 --global_batch 16384 --output {tmp_path / 'a.json'}"
    code, out, beside = config(arguments, capsys)
    assert code == 0 and out.startswith("# ") and "train_batch_size: 8192 -> 16384" not in out
    assert "# changed: train_batch_size: 8192 -> 16384" in beside
    assert [line for line in beside if line.startswith("# warning: ") and line.endswith("[R20]")]


FLAGS = (
    ("--global_batch 64", "--global_batch 8192", "--detection --global_batch 2", "--detection --global_batch 16"),
    ("", "--precision fp16", "--precision bf16", "--precision fp32"),
    ("", "--zero_stage 0", "--zero_stage 1", "--zero_stage 2"),
    ("", "--num_images 9000", "--set lbsgd.batch_norm.scope=all", "--set lbsgd.warmup.kind=constant"),
    ("", "--gpus 2 --micro_batch 32", "--set lbsgd.aggregation=null"),
)


def test_whatever_the_flags_check_finds_no_error_in_what_is_written():
    written = 0
    for flags in itertools.product(*FLAGS):
        try:
            made = generated(shlex.split(" ".join(flags)))
        except ConfigError:
            continue
        written += 1
        assert not [each for each in findings_of(made) if each.severity == "error"], flags
    assert written > 150


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("library", LIBRARIES)
def test_check_finds_no_error_in_what_a_library_gets(library, parts):
    for path in sorted(CONFIGS.glob("**/*.json")):
        needs = needs_of(Plan.read(path, 1), library, parts)
        assert not [each for each in findings_of(needs.config) if each.severity == "error"], path


# --- flags that contradict each other ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, both",
    [
        ("--global_batch 8192 --set train_batch_size=4096", ["--global_batch 8192", "--set train_batch_size=4096"]),
        ("--global_batch 8192 --epochs 5 --set lbsgd.epochs=4", ["--epochs 5", "--set lbsgd.epochs=4"]),
        (
            "--global_batch 8192 --num_images 60000 --set lbsgd.num_images=50000",
            ["--num_images 60000", "--set lbsgd.num_images=50000"],
        ),
        ("--global_batch 8192 --set lbsgd.seed=1 --set lbsgd.seed=2", ["--set lbsgd.seed=1", "--set lbsgd.seed=2"]),
        (
            "--global_batch 8192 --micro_batch 32 --set train_micro_batch_size_per_gpu=64",
            ["--micro_batch 32", "--set train_micro_batch_size_per_gpu=64"],
        ),
        (
            "--global_batch 8192 --zero_stage 1 --set zero_optimization=null",
            ["--zero_stage 1", "--set zero_optimization=null"],
        ),
    ],
)
@pytest.mark.parametrize("source", ["", f"--from {EIGHT_K} --for deepspeed --gpus 8"])
def test_a_key_given_twice_is_refused_by_the_names_of_both_flags(capsys, source, arguments, both):
    code, out, [error] = config(f"{arguments} {source}", capsys)
    assert code == 2 and out == "" and all(flag in error for flag in both) and "leave one of them out" in error


def test_a_key_given_twice_alike_is_taken(capsys):
    arguments = "--global_batch 8192 --epochs 90 --set lbsgd.epochs=90 --set train_batch_size=8192"
    code, out, err = config(arguments, capsys)
    assert code == 0 and out == EIGHT_K.read_text().replace(purpose(), "") and err == []


def purpose():
    """The lines of the shipped file that only --set can write."""
    block = json.loads(EIGHT_K.read_text())["lbsgd"]
    return "".join(f'    "{key}": {json.dumps(block[key])},\n' for key in ("purpose", "paper_error_pct"))


def test_the_grid_takes_no_other_flag(tmp_path, capsys):
    code, _, [error] = config(f"--all {tmp_path / 'grid'} --global_batch 8192 --gpus 3 --zero_stage 0", capsys)
    assert code == 2 and "--all does not take --global_batch, --gpus, --zero_stage;" in error
    assert not list(tmp_path.iterdir())
    code, _, [error] = config(f"--all {tmp_path / 'grid'} --set lbsgd.seed=1 --from {EIGHT_K} --for deepspeed", capsys)
    assert code == 2 and all(name in error for name in ("--set", "--from", "--for"))


def test_a_file_that_is_written_over_is_kept_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my.json").write_text('{"mine": 1}')
    for _ in range(2):  # the second time writes the same file
        assert main(["config", "--global_batch", "1024", "--output", "my.json"]) == 0
    assert capsys.readouterr().err == "# kept: the file as it was in my.json.orig\n"
    assert Path("my.json.orig").read_text() == '{"mine": 1}' and len(list(tmp_path.iterdir())) == 2


def test_a_stream_gets_the_json_alone_and_keeps_nothing(tmp_path, capsys):
    for arguments in ("--global_batch 1024", f"--from {EIGHT_K} --for accelerate --gpus 8"):
        printed = json.loads(config(arguments, capsys)[1])
        with open(tmp_path / "out.json", "w") as file:
            code, out, _ = config(f"{arguments} --output /dev/fd/{file.fileno()}", capsys)
        assert (code, out) == (0, "") and json.loads((tmp_path / "out.json").read_text()) == printed
    assert len([*tmp_path.iterdir()]) == 1


def test_a_name_that_no_file_can_have_is_one_line(capsys):
    code, out, [error] = config(f"--global_batch 1024 --output {'a' * 300}", capsys)
    assert (code, out) == (2, "") and error.endswith(": cannot be written (File name too long); choose another place")


def test_a_file_that_cannot_be_kept_is_not_written_over(tmp_path, monkeypatch, capsys):
    place = tmp_path / "my.json"
    place.write_text('{"mine": 1}')

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as locked:  # the superuser, who may run the tests, can read everything
        locked.setattr(Path, "read_bytes", refuse)
        code, _, [error] = config(f"--global_batch 1024 --output {place}", capsys)
    assert code == 2 and error == f"error: {place}: exists and cannot be read (Permission denied); choose another place"
    assert [*tmp_path.iterdir()] == [place] and place.read_text() == '{"mine": 1}'
