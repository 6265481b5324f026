"""Tools refuse wrong arguments in one line, and the small tools do what they say."""

import contextlib
import importlib
import io
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cifar10 import SmallResNet
from commands import ROOT, command, environment_with, refused, script
from mask_rcnn_digits import SmallMaskRCNN
from PIL import Image
from processes import forking, in_processes
from tool_modules import TOOLS, load_tool

from lbsgd.config.generate import generate
from lbsgd.config.overrides import Overrides
from lbsgd.config.plan import Plan
from lbsgd.convert.convert import convert
from lbsgd.data.beton import BetonFile
from lbsgd.data.coco_annotations import read_split
from lbsgd.errors import ConfigError, TrainingError
from lbsgd.report.run_log import RunLog
from lbsgd.train.device_rules import LAYOUT

SIDES = ("lbsgd.detection.shorter_side=64", "lbsgd.detection.longer_side=128")
DRAW = "tools/draw_detections.py"


# --- draw_detections --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Scenes whose only validation split has COCO's name."""
    folder = tmp_path_factory.mktemp("coco") / "scenes"
    load_tool("render_scenes").render(folder, 4, 2)
    (folder / "val").rename(folder / "val2017")
    annotations = folder / "annotations"
    (annotations / "instances_val.json").rename(annotations / "instances_val2017.json")
    return folder


@pytest.fixture
def run_of(tmp_path):
    """Return a function that writes the log of a run that has just begun, and returns its folder and plan."""

    def write(model):
        plan = Plan.read(generate(Overrides(4, 4, num_images=4, settings=SIDES), detection=True, gpus=1), 1, 4)
        with RunLog(tmp_path / model, {"model": model, **plan.as_dict(), "environment": {}}):
            return tmp_path / model, plan

    return write


def test_a_classifiers_run_is_refused_by_its_name(scenes, run_of):
    run, _ = run_of("resnet8")
    refused(script(DRAW, run, "--data_dir", scenes), "resnet8", "no detector", "mask_rcnn_resnet18_fpn")


def test_a_detectors_run_that_has_not_ended_is_refused(scenes, run_of):
    run, _ = run_of("mask_rcnn_resnet18_fpn")
    refused(script(DRAW, run, "--data_dir", scenes), run / "weights.pt", "when it ends")


def test_the_only_validation_split_is_found_and_drawn(scenes, run_of):
    run, plan = run_of("mask_rcnn_resnet18_fpn")
    split = read_split(scenes, "val2017", training=False)
    network = SmallMaskRCNN(SimpleNamespace(val=split, backbone=lambda: None))
    torch.save(network.network(len(split.names), plan).state_dict(), run / "weights.pt")
    done = script(DRAW, run, "--data_dir", scenes, "--num_images", 2)
    assert done.returncode == 0, done.stderr
    with Image.open(run / "detections.png") as picture:
        assert picture.format == "PNG"


def test_weights_of_other_categories_are_refused(scenes, run_of):
    run, plan = run_of("mask_rcnn_resnet18_fpn")
    split = read_split(scenes, "val2017", training=False)
    network = SmallMaskRCNN(SimpleNamespace(val=split, backbone=lambda: None))
    torch.save(network.network(len(split.names) + 1, plan).state_dict(), run / "weights.pt")
    refused(script(DRAW, run, "--data_dir", scenes), run / "weights.pt", "10 categories", "--data_dir")


def test_several_validation_splits_want_a_name(run_of, tmp_path):
    run, _ = run_of("mask_rcnn_resnet18_fpn")
    (run / "weights.pt").touch()
    (tmp_path / "annotations").mkdir()
    for year in (2014, 2017):
        (tmp_path / f"annotations/instances_val{year}.json").touch()
    refused(script(DRAW, run, "--data_dir", tmp_path), "instances_val2014, instances_val2017", "--val_split")


# --- flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tool, flags",
    [
        ("render_digits", ("--output_dir", "/proc/x")),
        ("render_scenes", ("--output_dir", "/proc/x")),
        ("render_scenes", ("--num_train", -1)),
        ("render_scenes", ("--num_val", 0)),
        ("bench_loader", ("data", "--threads", 0)),
        ("bench_loader", ("data", "--threads", 10**6)),
        ("bench_loader", ("data", "--rounds", 0)),
        ("bench_start", ("data", "--repeats", 0)),
        ("bench_step", ("--data_dir", "nowhere/data")),
        ("bench_batchnorm", ("--repeats", 0)),
        ("bench_batchnorm", ("--device", "toaster")),
        ("bench_aggregation", ("--rounds", 0)),
        ("bench_aggregation", ("--json", "/proc/x/found.json")),
        ("bench_convert", ("--images", "tools", "--work_dir", "/proc/x")),
        ("bench_convert", ("--images", "tools", "--rounds", 0)),
        ("bench_gpu", ("speed", "--seconds", "nan")),
        ("deepspeed_schema", ("--source", "tests")),
    ],
)
def test_flags_that_cannot_be_right_are_told_before_any_work(tool, flags):
    done = script(f"tools/{tool}.py", *flags)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and not done.stdout and "Traceback" not in done.stderr
    assert "error: " in last and str(flags[-1]) in last


# --- bench_aggregation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes, ours",
    [
        ([2, 2], ["flat", "three phases", "halving/doubling", "ZeRO-1, three phases"]),
        ([1, 1], ["flat", "halving/doubling", "ZeRO-1, flat"]),  # there are no phases inside a host
        ([2], ["flat", "halving/doubling", "ZeRO-1, flat"]),
        ([2, 2, 2], ["flat", "three phases", "ZeRO-1, three phases"]),  # halving/doubling needs a power of two
    ],
)
def test_each_algorithm_that_can_run_is_measured_once_by_its_name(sizes, ours):
    assert [*load_tool("bench_aggregation").different(sizes)] == ["stage 0", "ZeRO-1", "DDP", *ours]


# --- bench_loader -----------------------------------------------------------------------------------------------------


def test_lbsgd_reads_the_images_that_its_rivals_read(tmp_path):
    """The images after them are damaged, and the loader would report that."""
    contenders, count = load_tool("loader_contenders"), 2 * load_tool("loader_contenders").BATCH
    for i in range(count):
        file = tmp_path / f"source/{('train', 'val')[i == 0]}/0/{i:04}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (i, 0, 0)).save(file)
    convert(tmp_path / "source", tmp_path / "data", max_side=16, num_processes=1)
    beton = BetonFile.open(tmp_path / "data/train.beton")
    with open(beton.path, "r+b") as damaged:
        for place, size in zip(
            beton.images["data_at"][contenders.BATCH :], beton.sizes[contenders.BATCH :], strict=True
        ):
            damaged.seek(int(place))
            damaged.write(bytes(int(size)))
    for contender in (contenders.lbsgd_pixels, contenders.lbsgd_images):
        epochs = contender(tmp_path / "data", 1, contenders.BATCH)
        assert [next(epochs) for _ in range(2)] == 2 * [contenders.BATCH]


def test_images_that_a_run_would_convert_do_not_count():
    counted, images = load_tool("loader_contenders").counted, torch.zeros(4, 3, 5, 5)
    as_in_runs = images.contiguous(memory_format=LAYOUT)
    assert counted([(as_in_runs, None), (as_in_runs[:3], None)]) == 7
    for other in (images, as_in_runs.half()):
        with pytest.raises(ValueError, match="strides"):
            counted([(other, None)])


def contender(errors, make, argument):
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    return make(argument)


def test_a_contender_that_fails_is_named_and_ends_the_others(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)  # its processes look for it there
    bench = importlib.import_module("bench_loader")
    # Spawned processes would import torch again.
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: {"spawn": forking}[kind])
    waiting = bench.start("torchvision", contender, (tmp_path / "errors", os.walk, TOOLS))
    with pytest.raises(TrainingError, match="^DALI, CPU: its process has ended"):
        bench.start("DALI, CPU", contender, (tmp_path / "errors", iter, 0))  # its first epoch raises TypeError
    waiting.close()
    processes = multiprocessing.active_children()
    for process in processes:
        process.join(60)
    assert {process.exitcode for process in processes} <= {0, 1}
    assert (tmp_path / "errors").read_text().count("Traceback") == 1


# --- bench_convert ----------------------------------------------------------------------------------------------------


def test_images_that_are_not_there_are_one_line(tmp_path):
    done = command(sys.executable, "tools/bench_convert.py", "--images", tmp_path / "none.tar")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    refused = f"error: --images {tmp_path}/none.tar: no such file"
    assert done.stderr.splitlines() == [refused]


def test_images_that_are_no_tar_or_hold_no_jpeg_are_one_line(tmp_path):
    (tmp_path / "broken.tar").write_bytes(b"no tar")
    refused(script("tools/bench_convert.py", "--images", tmp_path / "broken.tar"), "broken.tar", "as a tar")
    refused(script("tools/bench_convert.py", "--images", tmp_path), tmp_path, "holds no .jpg and no .jpeg")


def test_a_case_is_timed_and_held_against_its_limit(tmp_path):
    data = io.BytesIO()
    Image.fromarray(np.zeros((40, 48, 3), np.uint8)).save(data, "JPEG")
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        member = tarfile.TarInfo("n/0.JPEG")
        member.size = len(data.getvalue())
        archive.addfile(member, io.BytesIO(data.getvalue()))
    flags = ("--cases", "short", "--num_images", 4, "--rounds", 1, "--work_dir", tmp_path)
    done = script("tools/bench_convert.py", "--images", tmp_path / "images.tar", *flags)
    assert done.returncode == 0, done.stderr
    assert "images/s" in done.stdout and "lbsgd reaches" in done.stdout


# --- bench_step -------------------------------------------------------------------------------------------------------


def test_both_sides_of_the_bench_of_a_cpu_are_on_the_cpu_where_there_is_a_gpu():
    """DeepSpeed's accelerator and torch choose the device when they are imported."""
    code = "import sys; sys.path.insert(0, 'tools'); import bench_step, os, torch; print(torch.cuda.is_available(), "
    code += "os.environ['CUDA_VISIBLE_DEVICES'] == '', os.environ['DS_ACCELERATOR'])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "0", "DS_ACCELERATOR": "cuda"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "False True cpu\n", done.stderr


def small_bench_of_a_step(data):
    """Return the exit code of tools/bench_step.py and its output, with a small network and small images."""
    tool, printed = load_tool("bench_step"), io.StringIO()
    tool.SIZES, tool.ResNet18 = replace(tool.SIZES, resolution=16, warm_up=1), SmallResNet
    sys.argv = ["bench_step.py", "--rounds", "2", "--data_dir", str(data)]
    with contextlib.redirect_stdout(printed):
        code = tool.main()
    return code, printed.getvalue()


def test_a_step_is_measured_and_printed(digits_data):
    [(code, printed)] = in_processes(1, small_bench_of_a_step, digits_data)
    assert code == 0 and "64 images of 16x16, n = 32" in printed
    assert re.search(r"^lbsgd / a bare PyTorch loop: \d\.\d{3} \[\S+, \S+\] \(plain ", printed, re.MULTILINE)
    assert printed.count("every 50 iterations") == 2
    assert re.search(r"^waiting for data: .* images/s\)$", printed, re.MULTILINE)


# --- bench_batchnorm --------------------------------------------------------------------------------------------------


def test_layers_are_timed_against_each_other():
    done = script("tools/bench_batchnorm.py", "--device", "cpu", "--channels", 2, "--size", 2, "--repeats", 2)
    assert done.returncode == 0, done.stderr
    assert re.search(r"float32 +│ +NCHW +│ +256 +│ +\d+\.\d\d +│ +\d+\.\d\d +│ +\d+\.\d\d", done.stdout)


# --- scaling ----------------------------------------------------------------------------------------------------------


def test_scaling_refuses_an_unknown_flag_and_prints_its_tables():
    for flag in ("--bogus", "--wrtie"):
        done = script("tools/scaling.py", flag)
        assert done.returncode == 2 and not done.stdout and f"unrecognized arguments: {flag}" in done.stderr
    done = script("tools/scaling.py")
    assert done.returncode == 0 and done.stdout.strip() in (ROOT / "docs/scaling.md").read_text()


def test_the_reference_takes_a_flag_for_no_folder():
    done = script("tools/reference.py", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: reference.py") and not (ROOT / "--help").exists()


# --- demo -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [("--output_dir", "runs/x"), ("--data_dir=data",), ("--deepspeed_config", "8k.json")])
def test_the_demo_refuses_what_it_chooses_itself(given):
    refused(script("tools/demo.py", *given), given[0].partition("=")[0], "--work_dir")


def test_the_demo_in_a_clone_that_it_may_not_write_asks_for_another_folder(tmp_path):
    (tmp_path / "file").touch()
    demo = load_tool("demo")
    demo.require_work_dir(tmp_path / "made" / "later")
    with pytest.raises(ConfigError, match="file cannot be written; say with --work_dir where data/ and runs/ shall go"):
        demo.require_work_dir(tmp_path / "file")


@pytest.mark.parametrize(
    "visible, processes, flags",
    [
        (None, 2, ["--num_accelerators", "2"]),
        ("", 2, ["--num_accelerators", "2"]),  # hidden, so the CPU computes
        ("3", 1, ["--include", "localhost:3"]),
        ("4,5,6", 2, ["--include", "localhost:4,5"]),
    ],
)
def test_the_demo_takes_the_gpus_that_the_variable_names(monkeypatch, visible, processes, flags):
    """DeepSpeed's launcher would take the first ones, which others may use."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    demo = load_tool("demo")
    assert demo.where(processes) == flags
    monkeypatch.setattr(demo, "num_processes", lambda: processes)
    *_, training = demo.commands(0, TOOLS)
    assert training[1:5] == ["--quiet", *flags, "--master_port"]


@pytest.mark.parametrize("accelerator, gpus, processes", [("cuda", 1, 1), ("cuda", 3, 2), ("cpu", 8, 2)])
def test_the_demo_starts_a_process_per_gpu_that_it_uses(monkeypatch, accelerator, gpus, processes):
    """With DS_ACCELERATOR=cpu it uses none of a host's GPUs."""
    if accelerator == "cpu":
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    else:
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert load_tool("demo").num_processes() == processes


def test_the_demo_refuses_gpus_that_the_launcher_does_not_understand(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-abc")
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES has GPU-abc"):
        load_tool("demo").where(1)


SAVES = """
import signal, sys, time
def save(*_):
    time.sleep(2)
    print("saved", flush=True)
    sys.exit(1)
signal.signal(signal.SIGTERM, save)
print("runs", flush=True)
time.sleep(60)
"""
STARTS = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]]).wait(); sys.exit(1)"
WAITS = "import sys; sys.path.insert(0, 'tools'); import demo; sys.exit(demo.run(sys.argv[1:]))"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("launched", [False, True])
def test_the_demo_told_to_stop_waits_until_its_command_has_saved(tmp_path, launched, number):
    """A launcher does not pass signals on, so the demo signals the launcher's children."""
    (tmp_path / "deepspeed").write_text(STARTS)
    words = [sys.executable, *([str(tmp_path / "deepspeed"), SAVES] if launched else ["-c", SAVES])]
    demo = subprocess.Popen(
        [sys.executable, "-c", WAITS, *words],
        cwd=ROOT,
        env=environment_with({}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert demo.stdout.readline() == "runs\n"
    demo.send_signal(number)
    said, errors = demo.communicate(timeout=60)
    assert (demo.returncode, said, errors) == (75, "saved\n", "")


# --- setup.sh ---------------------------------------------------------------------------------------------------------


def program(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{lines}")
    path.chmod(0o755)
    return path


def set_up(folder, **environment):
    """Run setup.sh in a folder that has the files that it reads first."""
    (folder / "tools").mkdir()
    for name in ("setup.cfg", "constraints.txt", "tools/setup.sh"):
        shutil.copy(ROOT / name, folder / name)
    everything = {**os.environ, **environment}
    return subprocess.run([folder / "tools/setup.sh"], capture_output=True, text=True, timeout=60, env=everything)


@pytest.mark.parametrize("given, had, torch", [("", "", "2.11.0"), ("12", "13", "2.10.0"), ("", "12", "2.10.0")])
def test_setup_takes_the_cuda_that_is_asked_for_or_the_one_that_is_there(given, had, torch, tmp_path):
    program(tmp_path / ".venv/bin/python", "exit 1\n")
    (tmp_path / ".venv/.complete").write_text(had)
    (tmp_path / ".venv/lib").mkdir()
    python = program(tmp_path / "python", '[ "$1" = -c ]\n')  # new enough, and makes no virtual environment
    assert set_up(tmp_path, CUDA=given, PYTHON=str(python)).returncode == 2
    # The files of two CUDAs have the same names, so nothing of the other one may stay.
    assert (tmp_path / ".venv/lib").exists() == (given in ("", had))
    lines = (tmp_path / ".venv/constraints.txt").read_text().splitlines()
    assert [line for line in lines if line.startswith("torch==")] == [f"torch=={torch}"]
    everything = (ROOT / "constraints.txt").read_text().splitlines()
    names = {line.split("==")[0] for line in everything} - {line.split("==")[0] for line in lines}
    assert all(name.startswith(("nvidia-", "cuda-")) or name == "triton" for name in names)
    assert bool(names) == (torch == "2.10.0")  # torch itself requires those of the other CUDA
    assert not (tmp_path / ".venv/.complete").exists()  # half of another CUDA is not complete


def test_a_cuda_that_was_not_tried_is_refused(tmp_path):
    ended = set_up(tmp_path, CUDA="11")
    assert (ended.returncode, ended.stdout) == (2, "") and not (tmp_path / ".venv").exists()
    assert ended.stderr == "setup: CUDA=11 is no build of torch that was tried; give 12 or 13\n"


def test_a_path_with_a_space_is_refused_before_anything_is_made(tmp_path):
    (folder := tmp_path / "my clone").mkdir()
    ended = set_up(folder)
    assert (ended.returncode, ended.stdout) == (2, "") and not (folder / ".venv").exists()
    [line] = ended.stderr.splitlines()
    assert line.startswith("setup: ") and str(folder) in line and line.endswith("rename the folder")


@pytest.mark.parametrize("cuda, runs", [("", False), ("13", False), ("12", True)])
def test_make_sets_up_again_for_another_cuda_than_is_there(cuda, runs, tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("setup.cfg", "setup.py", "constraints.txt"):
        (tmp_path / name).touch()
    program(tmp_path / "tools/setup.sh", 'echo "with $CUDA"\n')
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/.complete").write_text("13\n")
    command = ["make", "-s", "setup", *([f"CUDA={cuda}"] if cuda else [])]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert ("with 12\n" in said) == runs and ("with" in said) == runs


OLDER_PYTHON = """
[ "$1" = --version ] && { echo Python 3.10.13; exit; }
shift
code=$1
shift
exec %s -c "import sys; sys.version_info = (3, 10, 13, 'final', 0)
$code" "$@"
"""


def test_a_python_that_is_too_old_is_refused_before_anything_is_made(tmp_path):
    python = program(tmp_path / "python3.10", OLDER_PYTHON % sys.executable)
    ended = set_up(tmp_path, PYTHON=str(python))
    assert ended.returncode == 2 and not ended.stdout and not (tmp_path / ".venv").exists()
    [line] = ended.stderr.splitlines()
    assert line.startswith(f"setup: lbsgd needs Python 3.11 or newer, and {python} is Python 3.10.13; ")


@pytest.mark.parametrize(
    "said, told",
    [
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
            "setup: the disk is full: ",
        ),
        ("ERROR: No matching distribution found for torch", "setup: setuptools and wheel failed (exit code 1); "),
    ],
)
def test_a_setup_that_fails_says_why(said, told, tmp_path):
    program(tmp_path / ".venv/bin/python", f"echo '{said}' >&2\nexit 1\n")
    ended = set_up(tmp_path)
    assert ended.returncode == 2
    last = ended.stderr.splitlines()[-1]
    assert last.startswith(told) and str(tmp_path) in last
    assert (said in ended.stderr) == ("full" not in told)  # the reader gets one line if that says all
