"""tools/bench_gpu.py runs each of its lines on a CPU, in tiny sizes. A part that fails or hangs spoils no other."""

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from commands import script
from PIL import Image
from tool_modules import load_tool

from lbsgd.bench import correctness, speed
from lbsgd.bench.correctness import OUTCOME, SPARE_SECONDS, lines_of
from lbsgd.bench.figure import Figure, Goal, mean_figure, ratio_figure
from lbsgd.bench.parts import NotRun, Part, run_parts
from lbsgd.bench.process_tree import end_family
from lbsgd.bench.results import Results
from lbsgd.bench.sizes import ON_A_CPU
from lbsgd.bench.speed import measured
from lbsgd.errors import TrainingError

ROOT = Path(__file__).parent.parent
NOT_ON_A_CPU = {"memory": "not run"}


def running():
    """Return the command lines of all processes of this machine."""
    return "\n".join(" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"]))


def bench(*arguments):
    """Run the tool in a process with the imports already done. Return its exit code and its output.

    The tests of signals start the tool as a user does.
    """
    run = script(ROOT / "tools/bench_gpu.py", *arguments)
    return run.returncode, run.stdout + run.stderr


def read(folder, name):
    found = json.loads((folder / f"{name}.json").read_text())
    return found, {part["name"]: part for part in found["parts"]}


@pytest.fixture
def jpegs(tmp_path):
    """A tar of three small JPEGs, and a file that is no JPEG."""
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        for number in range(3):
            pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), np.uint8)
            data = io.BytesIO()
            Image.fromarray(pixels).save(data, "JPEG")
            for name, content in ((f"n/{number}.JPEG", data.getvalue()), (f"n/{number}.txt", b"no image")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return tmp_path / "images.tar"


def test_every_part_of_speed_runs_on_a_cpu(jpegs, tmp_path):
    code, printed = bench("speed", "--jpegs", jpegs, "--output_dir", tmp_path / "results")
    found, parts = read(tmp_path / "results", "speed")
    log = (tmp_path / "results/speed.log").read_text()
    assert {name: part["state"] for name, part in parts.items()} == dict.fromkeys(parts, "done") | NOT_ON_A_CPU, log
    assert code == 0, printed
    ratios = [figure for part in parts.values() for figure in part["figures"]]
    assert len(ratios) > 8 and all(figure["low"] <= figure["value"] <= figure["high"] for figure in ratios)
    assert {figure["goal"] for figure in ratios} >= {"at least 1.1", "at least 1", "at most 1.01", "at most 2"}
    for figure in parts["step"]["figures"]:
        assert [len(rounds) for rounds in figure["seconds"].values()] == [figure["count"]] * 2
    assert [figure["name"].partition(",")[0] for figure in parts["loader"]["figures"]] == [
        "waiting for data",
        "images/s",
    ]
    text = (tmp_path / "results/speed.md").read_text()
    assert f"# speed on {found['device']}" in text and "| % of the time | calls | kernel |" in text
    assert "3 JPEGs repeated to 24" in text
    assert len(list((tmp_path / "results").iterdir())) <= 4  # a machine brings back 8 files, of both benches


def test_every_part_of_correctness_runs_on_a_cpu(tmp_path):
    code, printed = bench("correctness", "--output_dir", tmp_path)
    _, parts = read(tmp_path, "correctness")
    log = (tmp_path / "correctness.log").read_text()
    assert {name: part["state"] for name, part in parts.items()} == dict.fromkeys(parts, "done"), log
    assert code == 0, printed
    [tests] = parts["tests"]["figures"]
    assert tests["value"] == 0 and tests["count"] >= 2 and tests["verdict"] == "reached"
    assert "1 iteration of kn = 128, no evaluation" in parts["demo"]["notes"]
    [row] = parts["digits"]["figures"]
    assert row["goal"] == "at most 1" and "published 1.07 ± 0.32 %" in row["beside"] and row["verdict"] == "missed"


# --- parts that go wrong ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    folder: Path | str = ""
    deadline: float = 0.0


def says_two_things(given, say):
    say(Figure("first", 1.0))
    say(f"settings {given.folder}")


def raises_after_one(given, say):
    say(Figure("before it broke", 2.0))
    raise RuntimeError("CUDA out of memory.\n Tried to allocate 20 GiB")


def hangs_after_one(given, say):
    say(Figure("before it hung", 3.0))
    subprocess.Popen(["sh", "-c", "sleep 1234.5; true"], start_new_session=True)
    time.sleep(1000)


def dies_after_one(given, say):
    say(Figure("before it died", 4.0))
    os._exit(7)


def leaves_a_child(given, say):
    subprocess.Popen(["sleep", "1235.5"], start_new_session=True)


def tells_its_deadline(given, say):
    say(str(given.deadline))


def has_nothing(given, say):
    raise NotRun("no images")


def waits_for_the_other(given, say):
    (given.folder / str(os.getpid())).touch()
    while len(list(given.folder.iterdir())) < 2:
        time.sleep(0.01)


def test_parts_that_measure_no_time_may_run_at_once(tmp_path):
    parts = [Part(name, name, waits_for_the_other, 60.0) for name in ("one", "two")]
    (folder := tmp_path / "both").mkdir()
    assert run_parts(parts, Given(folder), Results(tmp_path, "fake", {"device": "none"}), 60.0, together=True)
    code, printed = bench("speed", "--together")
    assert code == 2 and "--together is for correctness" in printed


def test_what_a_part_found_before_it_broke_hung_or_died_is_kept_and_the_others_go_on(tmp_path):
    makers = (raises_after_one, hangs_after_one, dies_after_one, has_nothing, says_two_things)
    seconds = {hangs_after_one: 20.0}  # enough for its start, too, on a busy machine
    parts = [Part(make.__name__, make.__name__, make, seconds.get(make, 60.0)) for make in makers]
    results = Results(tmp_path, "fake", {"device": "none"})
    assert not run_parts(parts, Given("given"), results, total_seconds=300.0)
    _, found = read(tmp_path, "fake")
    states = {name: (part["state"], [figure["value"] for figure in part["figures"]]) for name, part in found.items()}
    assert states == {
        "raises_after_one": ("failed", [2.0]),
        "hangs_after_one": ("out of time", [3.0]),
        "dies_after_one": ("failed", [4.0]),
        "has_nothing": ("not run", []),
        "says_two_things": ("done", [1.0]),
    }
    assert found["raises_after_one"]["why"] == "RuntimeError: CUDA out of memory. Tried to allocate 20 GiB"
    assert found["dies_after_one"]["why"] == "its process ended with code 7"
    assert found["says_two_things"]["notes"] == ["settings given"]
    assert "Traceback" in (tmp_path / "fake.log").read_text()
    assert "1234.5" not in running()
    assert "**out of time**" in (tmp_path / "fake.md").read_text() and (tmp_path / "fake.png").stat().st_size > 1000


def test_a_part_that_starts_late_ends_its_commands_by_the_same_deadline(tmp_path, monkeypatch):
    """A fork and imports may take longer than the time left for reporting."""
    results, began = Results(tmp_path, "fake", {"device": "none"}), time.monotonic()
    assert run_parts([Part("tells", "tells", tells_its_deadline, 60.0)], Given(), results, total_seconds=60.0)
    assert began + 60 <= float(results.parts[0].notes[0]) < began + 61
    given = SimpleNamespace(root=ROOT, deadline=time.monotonic() + SPARE_SECONDS + 0.5)
    # As on a busy machine, where the command's end is seen before the thread that ended it goes on.
    monkeypatch.setattr(correctness, "end_family", lambda pid: (end_family(pid), time.sleep(0.5)))
    with pytest.raises(TrainingError, match="sleep 50 ended because its time was over"):
        list(lines_of(["sleep", "50"], given))
    assert time.monotonic() < given.deadline


def test_a_process_that_leads_no_group_yet_is_ended_too():
    """As for a part that is still starting. Its children are ended too, even in another session."""
    starts = "import subprocess, time; subprocess.Popen(['sleep', '77.5'], start_new_session=True); time.sleep(77)"
    with subprocess.Popen([sys.executable, "-c", starts]) as process:
        while not (family := psutil.Process(process.pid).children()):
            time.sleep(0.05)
        end_family(process.pid)
        assert process.wait(5) == -signal.SIGKILL
    assert psutil.wait_procs(family, timeout=60)[1] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_bench_with_all_that_it_has_started(tmp_path, number):
    command = [
        sys.executable,
        "tools/bench_gpu.py",
        "correctness",
        "--parts",
        "tests",
        "--output_dir",
        tmp_path / "out",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as run:
        bench_itself, family, deadline = psutil.Process(run.pid), [], time.monotonic() + 60
        while not any("pytest" in each.cmdline() for each in family):
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
            family = bench_itself.children(recursive=True)
        run.send_signal(number)
        assert run.wait(10) == 128 + number
    assert list(tmp_path.glob("lbsgd_bench_*")) == []
    assert psutil.wait_procs(family, timeout=60)[1] == []


@pytest.mark.parametrize("call", ["start", "suspend", "kill"])
def test_a_signal_while_a_part_starts_or_ends_leaves_no_process(tmp_path, call):
    """If a part were stopped but missing from the list, Python would wait for it forever at exit."""
    seconds = f"1{os.getpid()}.{len(call)}"
    command = [sys.executable, ROOT / "tests/signalled_bench.py", call, seconds, tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as run:
        family, deadline = [], time.monotonic() + 30
        while run.poll() is None and time.monotonic() < deadline:
            family = psutil.Process(run.pid).children(recursive=True) or family
            time.sleep(0.05)
        for each in family if run.poll() is None else ():
            each.kill()
            run.kill()
    assert run.returncode == 128 + signal.SIGTERM
    assert seconds not in running()


def test_what_a_part_leaves_behind_in_another_session_ends_with_it(tmp_path):
    results = Results(tmp_path, "fake", {"device": "none"})
    assert run_parts([Part("leaves", "leaves", leaves_a_child, 60.0)], Given(), results, total_seconds=60.0)
    assert "1235.5" not in running()


def test_a_run_replaces_the_results_in_its_folder(tmp_path):
    first = Results(tmp_path, "fake", {"device": "none"})
    assert run_parts([Part("two", "two", says_two_things, 60.0)], Given(), first, total_seconds=60.0)
    assert first.picture.exists() and first.log.stat().st_mode & 0o111 == 0
    second = Results(tmp_path, "fake", {"device": "none"})
    assert not run_parts([Part("late", "late", says_two_things, 60.0)], Given(), second, total_seconds=1.0)
    assert not second.picture.exists() and not second.log.exists()


def test_a_part_for_which_no_time_is_left_is_not_begun_and_the_run_has_not_done_all(tmp_path):
    results = Results(tmp_path, "fake", {"device": "none"})
    assert not run_parts([Part("late", "late", says_two_things, 60.0)], Given(), results, total_seconds=1.0)
    [part] = results.parts
    assert (part.state, part.figures) == ("out of time", []) and part.why.startswith("not begun")


def test_a_part_that_cannot_run_here_is_no_failure(tmp_path):
    results = Results(tmp_path, "fake", {"device": "none"})
    assert run_parts([Part("none", "none", has_nothing, 60.0)], Given(), results, total_seconds=60.0)
    assert results.parts[0].state == "not run"


def test_a_run_that_left_parts_out_for_lack_of_time_ends_with_code_1(tmp_path):
    code, printed = bench("correctness", "--seconds", 1, "--output_dir", tmp_path)
    _, parts = read(tmp_path, "correctness")
    assert code == 1 and {part["state"] for part in parts.values()} == {"out of time"}, printed


# --- docs/gpu.md ------------------------------------------------------------------------------------------------------


def test_the_page_says_how_long_the_parts_may_take_together():
    page = (ROOT / "docs/gpu.md").read_text()
    seconds = load_tool("bench_gpu").SECONDS
    for name, module in (("speed", speed), ("correctness", correctness)):
        limits = sum(part.most_seconds for part in module.PARTS)
        assert re.search(rf"{limits} s\s+in\s+`{name}`", page), name
        assert any(limits < int(enough) < limits + 70 for enough in re.findall(r"--seconds (\d+)", page)), name
    assert f"at most {seconds:.0f} s" in page


def test_the_pages_check_of_a_machine_asks_for_what_the_tests_import():
    [check] = re.findall('python -c "import (.*)"', (ROOT / "docs/gpu.md").read_text())
    assert {"pytest", "hypothesis", "triton", "sklearn"} <= set(check.split(", "))
    assert "SITE=/" in (ROOT / "docs/gpu.md").read_text()


# --- figures ----------------------------------------------------------------------------------------------------------


def test_a_ratio_is_the_geometric_mean_of_its_rounds_with_students_interval():
    figure = ratio_figure("a / b", [2.0, 8.0], [1.0, 1.0])
    middle, half = math.log(4), 12.7062 * math.log(2)  # t(0.975, 1) · (log 8 − log 2) / √2 / √2
    assert figure.value == pytest.approx(4) and figure.count == 2
    assert math.log(figure.high) == pytest.approx(middle + half, rel=1e-4)
    assert math.log(figure.low) == pytest.approx(middle - half, rel=1e-4)
    mean = mean_figure("m", [1.0, 2.0, 3.0])  # t(0.975, 2) = 4.3027, s = 1
    assert (mean.value, mean.high) == (2.0, pytest.approx(2 + 4.3027 / math.sqrt(3), rel=1e-4))
    assert mean_figure("one", [5.0]).low is None


@pytest.mark.parametrize(
    "kind, low, high, verdict",
    [
        ("at most", 0.9, 1.02, "reached"),
        ("at most", 1.02, 1.04, "undecided"),
        ("at most", 1.04, 1.05, "missed"),
        ("at least", 1.04, 1.05, "reached"),
        ("at least", 0.9, 1.02, "missed"),
        ("within", 0.85, 0.89, "missed"),
        ("within", 0.89, 0.95, "undecided"),
        ("within", 0.91, 1.09, "reached"),
        ("within", 1.11, 1.2, "missed"),
        ("within", 0.5, 1.2, "undecided"),  # the goal lies whole in the interval
    ],
)
def test_a_goal_is_reached_only_with_the_whole_interval(kind, low, high, verdict):
    goal = Goal(kind, 0.1 if kind == "within" else 1.03)
    assert Figure("x", (low + high) / 2, low, high, goal=goal).verdict == verdict
    assert kind != "within" or str(goal) == "0.9 to 1.1"


def test_the_outcomes_of_tests_are_read_from_pytests_lines():
    lines = (
        "tests/test_a.py::test_b[cuda-fp16] PASSED                 [ 50%]",
        "tests/test_a.py::test_c[a b] FAILED  [100%]",
    )
    assert [OUTCOME.match(line).groups() for line in lines] == [
        ("tests/test_a.py::test_b[cuda-fp16]", "PASSED"),
        ("tests/test_a.py::test_c[a b]", "FAILED"),
    ]


def test_a_contestant_whose_loss_is_not_a_number_is_told():
    said = []
    steps = {"right": lambda: torch.tensor(True), "wrong": lambda: torch.tensor(False), "layer": lambda: (0,)}
    measured(SimpleNamespace(sizes=ON_A_CPU, device="cpu"), said.append, steps)
    assert said == ["**wrong: its loss is not a number, so its times say nothing**"]


@pytest.mark.parametrize(
    "lines, verdict",
    [
        ([], ""),  # no test ran
        (["tests/test_a.py::test_b PASSED"], "reached"),
        (["tests/test_a.py::test_b FAILED"], "missed"),
        (["tests/test_a.py::test_b SKIPPED (needs a GPU)"], ""),
        (["tests/test_a.py::test_b PASSED", "ERROR    DeepSpeed:engine.py:1 overflow"], "reached"),
        (["tests/test_a.py::test_b PASSED", "ERROR tests/test_c.py - ImportError"], "missed"),
    ],
)
def test_tests_that_did_not_run_reach_nothing(lines, verdict, monkeypatch):
    monkeypatch.setattr("lbsgd.bench.correctness.lines_of", lambda *_, **__: iter(lines))
    said = []
    correctness.tests_on_the_device(SimpleNamespace(root=ROOT, sizes=ON_A_CPU), said.append)
    assert said[0].verdict == verdict
