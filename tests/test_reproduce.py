"""A grid of runs: each once, side by side, resumed after SIGKILL, with one code; the recipe takes no time."""

import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from grid_logs import DIGITS, write_log

from lbsgd.commands.main import main
from lbsgd.commands.reproduce import seeds
from lbsgd.commands.simulate import NOT_SIMULATED
from lbsgd.disk import alone_in
from lbsgd.errors import ConfigError, DataError, Stopped, TrainingError
from lbsgd.experiments import launch
from lbsgd.experiments.catalogue import DATA_SETS, STUDIES
from lbsgd.experiments.checkout import ROOT, Checkout, git, one_at_a_time, open_checkout
from lbsgd.experiments.collect import MOST_BYTES, bring_back, collect
from lbsgd.experiments.grid import Job, Row, gradual, jobs_of
from lbsgd.experiments.launch import Grid, Machine
from lbsgd.experiments.overview import Overview
from lbsgd.experiments.reproduce import GridRequest, prepare, report, reproduce, require_together
from lbsgd.experiments.runner import Runner
from lbsgd.processes.signals import STOP_SIGNALS
from lbsgd.report.run_log import DIVERGED, read_run

RECIPE = """
import json, os, sys, time
from pathlib import Path
sys.path.insert(0, os.environ["TESTS"])
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = Path(flags["--output_dir"])
with open("starts.txt", "a") as starts:
    starts.write(f"{folder.parent.name}/{folder.name}\\n")
behaviour = os.environ.get("BEHAVIOUR", "")
if behaviour == "sleep" and folder.name == "seed1":
    time.sleep(600)
if behaviour == "fail" and folder.name == "seed1":
    sys.exit("error: cannot read the data; mend it")
if behaviour == "diverge" and folder.name == "seed1":
    print("error: the loss of iteration 5 is not a number", file=sys.stderr)
    sys.exit(3)
if behaviour.startswith("end with ") and folder.name == "seed1":
    _, _, code, words = behaviour.split(maxsplit=3)
    print(words, file=sys.stderr)
    sys.exit(int(code))
header = {"model": "resnet8", "precision": "fp32", "schedule": {}, "config": {}}
counts = {key: 1 for key in ("global_batch", "num_workers", "iterations_per_epoch")}
header = {"kind": "run", **header, **counts, "recipe": {"epochs": 1}}
epoch = {"kind": "epoch", "epoch": 1, "train_loss": 1, "train_top1_error_pct": 5, "val_top1_error_pct": 5, "seconds": 1}
records = [header, epoch, {"kind": "result", "val_top1_error_pct": 5}]
(folder / "log").write_text("".join(json.dumps(record) + "\\n" for record in records))
os.replace(folder / "log", folder / "log.jsonl")  # as RunLog does: the grid looks at the log at any moment
(folder / "weights.pt").write_bytes(b"many")
(folder / "checkpoints").mkdir()
"""
ROWS = (Row("a", 1), Row("b", 8))
DATA = replace(DIGITS, recipe="recipe.py", data_dir="{work_dir}")


def runner(folder, side_by_side=2, epochs=None, finished=lambda job: None):
    """A runner of the recipe above, in folder/code."""
    (folder / "code").mkdir(exist_ok=True)
    (folder / "code" / "recipe.py").write_text(RECIPE)
    checkout = Checkout(folder / "code", "abc")
    return Runner(Grid(DATA, folder, folder, Machine(side_by_side, 1), epochs), checkout, finished)


def starts(folder):
    return sorted((folder / "code" / "starts.txt").read_text().split())


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("TESTS", str(ROOT / "tests"))
    monkeypatch.setattr("lbsgd.experiments.runner.LOOK_SECONDS", 0.05)


def test_every_run_runs_once_and_a_second_start_runs_nothing(tmp_path, capsys):
    finished = []
    for _ in range(2):
        runner(tmp_path, finished=lambda job: finished.append(job.name)).run(jobs_of(ROWS, (0, 1)))
    assert starts(tmp_path) == ["a/seed0", "a/seed1", "b/seed0", "b/seed1"]
    assert sorted(finished) == sorted(2 * ["a/seed0", "a/seed1", "b/seed0", "b/seed1"])
    assert len(list(tmp_path.glob("*/*/weights.pt"))) == 4 and not list(tmp_path.glob("*/*/checkpoints"))
    said = capsys.readouterr().out
    assert "4 of 4 runs, 100 %" in said and "a/seed0: error 5.00 %" in said and "4 of 4 runs were done before" in said


def test_no_more_runs_go_on_at_a_time_than_are_asked_for_each_in_a_place_of_its_own(tmp_path, monkeypatch):
    grid, start, seen = runner(tmp_path, side_by_side=2), launch.start, []

    def watched(job, given, checkout, slot):
        seen.append(sorted([*(started.slot for started in grid.running), slot]))
        return start(job, given, checkout, slot)

    monkeypatch.setattr(launch, "start", watched)
    grid.run(jobs_of(ROWS, (0, 1)))
    assert [0, 1] in seen and all(slots in ([0], [1], [0, 1]) for slots in seen)


def test_a_waiting_run_that_another_grid_finishes_is_published_and_does_not_run_here(tmp_path, capsys):
    published = []

    def finished(job):
        published.append(job.name)
        if job.seed == 0:  # the other grid ends as well
            shutil.copytree(tmp_path / "a/seed0", tmp_path / "a/seed1")

    runner(tmp_path, side_by_side=1, finished=finished).run(jobs_of(ROWS[:1], (0, 1)))
    assert starts(tmp_path) == ["a/seed0"] and published == ["a/seed0", "a/seed1"]
    assert "2 of 2 runs, 100 %   a/seed1: error 5.00 %" in capsys.readouterr().out


def test_rows_that_studies_share_run_once(tmp_path):
    studies = tuple(STUDIES[name] for name in ("table1", "table2a", "table2b", "figure1"))
    request = GridRequest(studies, DIGITS, (0, 1, 2, 3, 4), tmp_path, tmp_path)
    assert len(request.rows) == 16 and len(request.jobs) == 80
    assert len({job.name for job in request.jobs}) == 80
    assert [job.seed for job in request.jobs[:16]] == [0] * 16  # first all rows with one seed


def test_studies_of_one_grid_share_its_code_its_logs_and_the_rows_of_the_same_name(tmp_path):
    names = ("longer_table1", "longer_table2a", "longer_table2b", "longer_figure5")
    together = GridRequest(tuple(STUDIES[name] for name in names), DIGITS, (0,), tmp_path, tmp_path)
    assert [row.name for row in together.rows if row.name in ("x1", "x8")] == ["x1", "x8"]
    assert len(together.rows) == len(set(together.rows)) == 4 + 8 + 4 - 2 - 2
    for name in names:
        alone = GridRequest((STUDIES[name],), DIGITS, (0,), tmp_path, tmp_path)
        assert (alone.grid, alone.logs) == (together.grid, together.logs)
        assert set(alone.rows) <= set(together.rows)  # the same rows, because a name stands for one recipe


def test_longer_figure1_adds_the_doublings_between_to_the_runs_of_longer():
    data = DATA_SETS["cifar10"]
    rows = {row.name: row for row in STUDIES["longer_figure1"].rows(data)}
    assert list(rows) == ["x1", "x2", "x4", "x8", "x16", "x32"]
    assert all(rows[row.name] == row for row in STUDIES["longer"].rows(data))
    assert STUDIES["longer_figure1"].grid == STUDIES["longer"].grid


def test_a_deeper_network_changes_the_recipe_alone(tmp_path):
    for name, script in (("digits", "digits_resnet14"), ("cifar10", "cifar10_resnet14"), ("imagenet", "resnet101")):
        data = DATA_SETS[name]
        grid = Grid(data, tmp_path, tmp_path, Machine(1, 1))
        for factor, row in zip((1, data.large), STUDIES["table2c"].rows(data), strict=True):
            deeper, own = (launch.command(Job(each, 0), grid) for each in (row, gradual(factor)))
            differing = [(Path(a).stem, Path(b).name) for a, b in zip(deeper, own, strict=True) if a != b]
            assert differing[0] == (script, Path(data.recipe).name)
            assert differing[1:] == [("seed0", "seed0")]  # in separate folders
    with pytest.raises(ConfigError, match="table2c has nothing to run on digits18"):
        require_together(STUDIES["table2c"], DATA_SETS["digits18"])


@pytest.mark.parametrize("name", DATA_SETS)
def test_every_row_of_every_data_set_is_a_plan(name):
    data = DATA_SETS[name]
    for study in (study for study in STUDIES.values() if study.is_detection == data.is_detection):
        for row in study.rows(data):
            plan = launch.plan_of(Job(row, 3), data, ROOT)
            assert plan.global_batch == row.factor * data.base_batch and plan.recipe.seed == 3
            left_out = plan.num_images % plan.global_batch
            assert left_out / plan.num_images <= 0.05


@pytest.mark.parametrize("name", [name for name, data in DATA_SETS.items() if not data.is_detection])
def test_a_data_set_and_its_json_agree_on_the_schedule_and_longer_stretches_it(name):
    data = DATA_SETS[name]
    rows = [Row("large", data.large), STUDIES["longer"].rows(data)[1]]
    plain, longer = [launch.plan_of(Job(row, 0), data, ROOT).recipe for row in rows]
    assert (plain.epochs, plain.warmup.epochs) == (data.epochs, data.warmup_epochs)
    assert tuple(plain.decay.epochs) == data.decay_epochs
    assert (longer.epochs, longer.warmup.epochs) == (3 * data.epochs, 3 * data.warmup_epochs)
    assert longer.decay.epochs == [3 * epoch for epoch in data.decay_epochs]
    assert longer.linear_scaling.base_lr == data.base_lr / 4


@pytest.mark.parametrize("name", [name for name, data in DATA_SETS.items() if not data.is_detection])
@pytest.mark.parametrize("table", ["table1", "table2a"])
def test_a_table_for_longer_differs_from_the_table_in_its_schedule_alone(table, name):
    def recipe(row):
        return launch.plan_of(Job(row, 0), data, ROOT).recipe

    data = DATA_SETS[name]
    for plain, longer in zip(STUDIES[table].rows(data), STUDIES[f"longer_{table}"].rows(data), strict=True):
        now, then = recipe(plain), recipe(longer)
        assert (then.epochs, then.decay.epochs) == (3 * now.epochs, [3 * epoch for epoch in now.decay.epochs])
        assert (then.warmup.kind, then.warmup.epochs) == (now.warmup.kind, 3 * now.warmup.epochs)
        schedule = {"epochs", "decay", "warmup", "purpose", "paper_error_pct"}
        assert then.model_dump(exclude=schedule) == now.model_dump(exclude=schedule)


GRID = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import lbsgd.experiments.runner
from test_reproduce import ROWS, jobs_of, runner
lbsgd.experiments.runner.LOOK_SECONDS = 0.05
runner(Path({folder!r})).run(jobs_of(ROWS, (0, 1)))
"""


def start_grid(folder, behaviour):
    code = GRID.format(tests=str(ROOT / "tests"), folder=str(folder))
    environment = {**os.environ, "BEHAVIOUR": behaviour}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "code" / "starts.txt").exists() or "seed1" not in (folder / "code" / "starts.txt").read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    return process


def test_a_killed_grid_goes_on_and_its_runs_end_with_it(tmp_path):
    grid = start_grid(tmp_path, "sleep")
    grid.kill()
    grid.wait()
    runner(tmp_path).run(jobs_of(ROWS, (0, 1)))  # waits for a run that still holds its lock
    assert set(starts(tmp_path)) == {"a/seed0", "a/seed1", "b/seed0", "b/seed1"}
    assert starts(tmp_path).count("a/seed0") == starts(tmp_path).count("b/seed0") == 1
    assert all(read_run(folder).result for folder in tmp_path.glob("*/seed*"))


def test_a_grid_told_to_stop_lets_its_runs_end_first(tmp_path):
    grid = start_grid(tmp_path, "sleep")
    grid.send_signal(signal.SIGTERM)
    assert grid.wait(120) != 0
    for folder in tmp_path.glob("*/seed1"):
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # no process holds it


@pytest.fixture(params=STOP_SIGNALS)
def number(request):
    """A stop signal that does not end the tests if nothing catches it."""
    before = signal.signal(request.param, lambda number, frame: None)
    yield request.param
    signal.signal(request.param, before)


def test_a_grid_says_by_which_signal_it_was_stopped_and_catches_none_afterwards(tmp_path, number):
    before, grid = signal.getsignal(number), runner(tmp_path, finished=lambda job: signal.raise_signal(number))
    with pytest.raises(Stopped, match=f"^{number.name}: the runs have saved what they had; the same command goes on"):
        grid.run(jobs_of(ROWS, (0, 1)))
    assert signal.getsignal(number) == before


def test_failed_runs_are_named_with_their_error_at_once_and_the_others_finish(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BEHAVIOUR", "fail")
    with pytest.raises(TrainingError, match="a/seed1: error: cannot read the data; mend it .*output.txt"):
        runner(tmp_path).run(jobs_of(ROWS[:1], (0, 1, 2)))
    assert "a/seed1: ended with exit code 1: error: cannot read the data; mend it\n" in capsys.readouterr().out
    assert read_run(tmp_path / "a/seed2").result


def test_a_diverged_run_is_a_result(tmp_path, monkeypatch):
    monkeypatch.setenv("BEHAVIOUR", "diverge")
    runner(tmp_path).run(jobs_of(ROWS[:1], (0, 1)))
    assert (tmp_path / "a/seed1/diverged.txt").read_text() == "error: the loss of iteration 5 is not a number\n"


@pytest.mark.parametrize(
    "code, words",
    [
        (3, "error: in iteration 0 a gradient came twice"),
        (2, "error: --lr: x is not a number"),
        (75, "stopped: SIGTERM: saved after 4 iterations"),  # by someone who did not stop the grid
    ],
)
def test_a_run_that_was_stopped_or_has_the_code_or_the_words_of_divergence_alone_has_failed(
    tmp_path, monkeypatch, code, words
):
    monkeypatch.setenv("BEHAVIOUR", f"end with {code} {words}")
    with pytest.raises(TrainingError, match=f"a/seed1: {words}"):
        runner(tmp_path).run(jobs_of(ROWS[:1], (0, 1)))
    assert not (tmp_path / "a/seed1/diverged.txt").exists()


def test_a_run_stays_locked_until_it_is_written_down_that_it_diverged(tmp_path, monkeypatch):
    """Otherwise another grid would start it again."""
    held = []

    def clear_up(folder):
        with open(folder / "lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.append(folder.name)

    monkeypatch.setattr(launch, "clear_up", clear_up)
    monkeypatch.setenv("BEHAVIOUR", "diverge")
    runner(tmp_path).run(jobs_of(ROWS[:1], (1,)))
    assert held == ["seed1"]


def test_progress_counts_the_epochs_of_each_row(tmp_path):
    rows = (Row("x1", 1), Row("x1_short", 1, epochs=6))
    write_log(tmp_path, rows[1], 0, [5.0] * 3, planned=6)
    overview = Overview(jobs_of(rows, (0,)), tmp_path, runner(tmp_path).epochs_of)
    assert overview.standing() == "0 of 2 runs, 8 %"  # 3 of 30 + 6
    trial = Overview(jobs_of(rows, (0,)), tmp_path, runner(tmp_path, epochs=2).epochs_of)
    assert trial.standing() == "0 of 2 runs, 50 %"
    for given, expected in ((None, "6"), (2, "2"), (10, "6")):  # --epochs ends runs earlier, and lengthens none
        command = launch.command(Job(rows[1], 0), Grid(DATA, tmp_path, tmp_path, Machine(1, 1), given))
        assert command.count("--epochs") == 1 and command[command.index("--epochs") + 1] == expected


@pytest.mark.parametrize("study", ["async", "update-magnitude"])
def test_a_simulated_run_is_given_no_flag_that_simulations_refuse(tmp_path, study):
    for row in STUDIES[study].rows(DATA):
        command = launch.command(Job(row, 0), Grid(DATA, tmp_path, tmp_path, Machine(1, 1)))
        assert not {flag for flag in NOT_SIMULATED if f"--{flag}" in command}


IDENTITY = ("-c", "user.name=a", "-c", "user.email=a@b")


@pytest.fixture
def repository(tmp_path):
    """A git repository with two commits, the first with a = 1 in its recipe; and a function that makes the second."""
    folder = tmp_path / "repository"
    (folder / "recipes").mkdir(parents=True)
    (folder / "recipes" / "a.py").write_text("a = 1\n")
    git(tmp_path, "init", "-q", str(folder))
    git(folder, "add", ".")
    git(folder, *IDENTITY, "commit", "-qm", "first")
    return folder


def change(repository):
    (repository / "recipes" / "a.py").write_text("a = 2\n")
    git(repository, *IDENTITY, "commit", "-qam", "second")


def test_a_changed_checkout_is_refused(tmp_path, repository):
    checkout = open_checkout(tmp_path / "grid", root=repository)
    change(repository)
    assert open_checkout(tmp_path / "grid", root=repository) == checkout  # work in the repository goes on
    assert (checkout.folder / "recipes" / "a.py").read_text() == "a = 1\n"
    (checkout.folder / "recipes" / "a.py").write_text("a = 3\n")
    with pytest.raises(ConfigError, match="has changed files .*recipes/a.py.* must not differ in code"):
        open_checkout(tmp_path / "grid", root=repository)


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_grid_goes_on_where_its_clone_was_moved(tmp_path, repository, forgotten):
    """git forgets a missing worktree when another one is made."""
    grid = repository / "runs" / "grid"
    commit = open_checkout(grid, root=repository).commit
    change(repository)
    moved = repository.rename(tmp_path / "moved")
    if forgotten:
        git(moved, "worktree", "prune")
    checkout = open_checkout(moved / "runs" / "grid", root=moved)
    assert checkout.commit == commit and (checkout.folder / "recipes" / "a.py").read_text() == "a = 1\n"
    (checkout.folder / "recipes" / "a.py").write_text("a = 3\n")
    with pytest.raises(ConfigError, match="has changed files"):
        open_checkout(moved / "runs" / "grid", root=moved)


def test_a_grid_goes_on_from_its_published_runs_with_their_code(tmp_path, repository):
    """On another machine, which has the repository but nothing in runs/."""
    results, grid = tmp_path / "results", tmp_path / "grid"
    first = open_checkout(grid, results, repository).commit
    change(repository)
    there = open_checkout(tmp_path / "there", results, repository)
    assert there.commit == first and (there.folder / "recipes" / "a.py").read_text() == "a = 1\n"
    (results / "grid.json").unlink()
    elsewhere = tmp_path / "elsewhere"
    assert open_checkout(elsewhere, results, repository).commit != first
    with pytest.raises(ConfigError, match="grid runs commit .* but the runs in .*results are of commit"):
        open_checkout(grid, results, repository)
    (results / "grid.json").write_text(json.dumps({"commit": 40 * "0"}))
    with pytest.raises(ConfigError, match="this clone lacks commit 0000000000, .*fetch --unshallow"):
        open_checkout(tmp_path / "anew", results, repository)


@pytest.mark.parametrize("published", [False, True])
def test_a_clone_of_another_user_is_told_from_one_that_lacks_a_commit(tmp_path, repository, published, monkeypatch):
    """git trusts no repository of another user, and its reason stands above two lines of advice."""
    if published:
        open_checkout(tmp_path / "grid", tmp_path / "results", repository)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    told = r"git rev-parse failed in .*repository \(fatal: detected dubious ownership .*; .* git clone of your own$"
    with pytest.raises(ConfigError, match=told):
        open_checkout(tmp_path / "anew", tmp_path / "results", repository)


@pytest.mark.parametrize("blocked", ["results/digits", "results/digits/grid.json.tmp"])
def test_a_place_for_results_that_cannot_be_written_notes_no_commit(tmp_path, repository, blocked):
    """Otherwise the grid of that folder would be refused from then on next to results of another commit."""
    place = tmp_path / blocked
    place.parent.mkdir(parents=True)
    place.mkdir() if place.suffix else place.write_text("")
    with pytest.raises(OSError, match="grid.json.tmp|results/digits"):
        open_checkout(tmp_path / "grid", tmp_path / "results/digits", repository)
    assert not (tmp_path / "grid/grid.json").exists()


def test_a_run_that_is_published_does_not_run_again(tmp_path):
    published, here = tmp_path / "results" / "a" / "seed0", tmp_path / "a" / "seed0"
    runner(tmp_path, finished=lambda job: collect(here, published)).run(jobs_of(ROWS[:1], (0,)))
    shutil.rmtree(here)
    bring_back(published, here)
    runner(tmp_path).run(jobs_of(ROWS[:1], (0, 1)))
    assert starts(tmp_path) == ["a/seed0", "a/seed1"]


def test_a_finished_grid_is_reported_from_its_published_logs_without_data(tmp_path, capsys):
    shutil.copytree(ROOT / "results" / "digits" / "runs", tmp_path / "results" / "digits" / "runs")
    shutil.copy(ROOT / "results" / "digits" / "grid.json", tmp_path / "results" / "digits")
    command = ["reproduce", "table2b", "digits", "--work_dir", tmp_path, "--results", tmp_path / "results"]
    assert main([*map(str, command)]) == 0
    assert re.search(r"all \d+ are in .*/results/digits/runs, of commit \w{10}", capsys.readouterr().out)
    assert not (tmp_path / "runs").exists()  # with other --results a grid begins again, not done there
    tables = (folder / "digits" / "table2b" / "tables.md" for folder in (tmp_path / "results", ROOT / "results"))
    assert len({table.read_bytes() for table in tables}) == 1 and not (tmp_path / "data").exists()


def test_published_runs_are_told_where_their_page_cannot_be_written(tmp_path, capsys):
    shutil.copytree(ROOT / "results" / "digits" / "runs", tmp_path / "digits" / "runs")
    shutil.copy(ROOT / "results" / "digits" / "grid.json", tmp_path / "digits")
    folder = tmp_path / "digits" / "table1"
    folder.touch()  # a file in its place, because root could write into a locked folder
    assert main(["reproduce", "table1", "digits", "--results", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert (
        "| gradual warmup |" in out
        and "| with gradual warmup the large batch reaches the baseline's error | yes" in out
    )
    last = f"warning: {folder} cannot be written (File exists), so the page there is not made again"
    assert out.splitlines()[-1] == last and err == ""


def test_data_made_by_other_code_are_refused_with_what_to_do(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "tool.py").write_text("import sys; sys.exit('error: already holds another data set')")
    data = replace(DIGITS, prepare=(("tool.py",),), data_dir="{work_dir}/data")
    request = GridRequest((), data, (0,), tmp_path, tmp_path)
    with pytest.raises(DataError, match="another data set; if other code than 0123456789 made .*/data, delete it$"):
        prepare(request, Checkout(tmp_path, "0123456789abc"))


def test_published_logs_are_thinned_and_nothing_else_changes(tmp_path):
    folder = write_log(tmp_path, STUDIES["table1"].rows(DIGITS)[0], 0, [5.0] * 30)
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    iteration = json.loads(lines[1])
    more = [json.dumps({**iteration, "iteration": t, "epoch": t / 48}) + "\n" for t in range(48 * 30)]
    log.write_text("".join([lines[0], *more, *(line for line in lines[1:] if '"iteration"' not in line[:22])]))
    collect(folder, tmp_path / "published")
    published = tmp_path / "published" / "log.jsonl"
    assert log.stat().st_size > 3 * MOST_BYTES > 3 * published.stat().st_size
    before, after = read_run(folder), read_run(tmp_path / "published")
    assert (after.header, after.epochs, after.result) == (before.header, before.epochs, before.result)
    assert [record["epoch"] for record in after.iterations] == [float(epoch) for epoch in range(30)]


def test_a_log_is_published_by_one_grid_at_a_time(tmp_path):
    """They write through a file of the same name."""
    folder = write_log(tmp_path, STUDIES["table1"].rows(DIGITS)[0], 0, [5.0])
    published = tmp_path / "published"
    published.mkdir()
    with alone_in(published):
        other = threading.Thread(target=collect, args=(folder, published))
        other.start()
        other.join(0.2)
        assert other.is_alive() and list(published.iterdir()) == []
    other.join(10)
    assert read_run(published).epochs == read_run(folder).epochs


def test_a_published_log_says_once_what_a_resumed_run_repeats(tmp_path):
    folder = write_log(tmp_path, STUDIES["table1"].rows(DIGITS)[0], 0, [5.0, 4.0, 3.0])
    log = folder / "log.jsonl"
    first, *rest = log.read_text().splitlines(keepends=True)
    resume = {**json.loads(first), "kind": "resume", "iteration": 48, "world_size": 8}
    log.write_text(first + json.dumps(resume) + "\n" + "".join(rest) + '{"kind": "epo')  # killed
    collect(folder, tmp_path / "published")
    _, second, *_ = (tmp_path / "published" / "log.jsonl").read_text().splitlines()
    assert json.loads(second) == {"kind": "resume", "iteration": 48, "world_size": 8}
    assert read_run(tmp_path / "published").epochs == read_run(folder).epochs


@pytest.mark.parametrize("epochs, iterations", [(200, 100), (400, 0)])
def test_a_long_log_is_published_with_fewer_iterations_or_without(tmp_path, epochs, iterations):
    folder = write_log(tmp_path, STUDIES["table1"].rows(DIGITS)[0], 0, [5.0] * epochs)
    collect(folder, tmp_path / "published")
    published = read_run(tmp_path / "published")
    assert published.epochs == read_run(folder).epochs and len(published.iterations) == iterations


def test_a_diverged_run_comes_back_as_one_and_a_log_of_this_machine_stays(tmp_path):
    folder = write_log(tmp_path, STUDIES["table1"].rows(DIGITS)[0], 0, [5.0, 90.0], planned=6)
    (folder / DIVERGED).write_text("error: the loss of iteration 5 is not a number\n")
    collect(folder, tmp_path / "published")
    bring_back(tmp_path / "published", tmp_path / "elsewhere" / "seed0")
    assert launch.is_done(tmp_path / "elsewhere" / "seed0")
    (folder / "log.jsonl").write_text("of this machine")
    bring_back(tmp_path / "published", folder)
    assert (folder / "log.jsonl").read_text() == "of this machine"


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), FileNotFoundError(2, "No such file")])
def test_what_cannot_be_published_ends_no_grid(tmp_path, monkeypatch, capsys, failure):
    def full(path, data):
        raise failure

    monkeypatch.setattr("lbsgd.experiments.collect.replace_file", full)
    finished = lambda job: collect(job.folder(tmp_path), tmp_path / "results")  # noqa: E731
    for _ in range(2):  # also for what was done before this start
        runner(tmp_path, finished=finished).run(jobs_of(ROWS[:1], (0, 1)))
        assert f"a/seed0 cannot be published in {tmp_path}/results: {failure.strerror}" in capsys.readouterr().out
    assert starts(tmp_path) == ["a/seed0", "a/seed1"]


def test_a_study_without_a_run_is_told(tmp_path):
    with pytest.raises(DataError, match="runs holds no run of table1, so there is nothing to report"):
        report(GridRequest((STUDIES["table1"],), DIGITS, (0,), tmp_path, tmp_path), "abc")


def test_a_grid_killed_while_its_checkout_was_made_goes_on(tmp_path, repository):
    checkout = open_checkout(tmp_path / "grid", root=repository)
    (tmp_path / "grid" / "grid.json").unlink()
    (checkout.folder / "recipes" / "a.py").write_text("half")
    assert open_checkout(tmp_path / "grid", root=repository) == checkout
    assert (checkout.folder / "recipes" / "a.py").read_text() == "a = 1\n"


def test_a_second_start_of_a_grid_waits_until_code_and_data_of_the_first_are_there(tmp_path, monkeypatch, capsys):
    """Otherwise it would take the first one's checkout for the remains of a killed start."""
    begun = []
    monkeypatch.setattr("lbsgd.experiments.reproduce.begin", lambda request: sys.exit(begun.append(request)))
    request = GridRequest((STUDIES["table1"],), DIGITS, (0,), tmp_path, tmp_path / "results")

    def start():
        with suppress(SystemExit):
            reproduce(request)

    second = threading.Thread(target=start)
    with one_at_a_time(request.grid):
        second.start()
        second.join(0.5)
        assert begun == [] and second.is_alive()
    second.join(60)
    assert begun == [request] and "waiting        for another start of " in capsys.readouterr().out


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without locks, as some clusters mount theirs."""

    def flock(_file, _how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_file_system_without_locks_ends_no_grid(tmp_path, no_locks):
    with one_at_a_time(tmp_path / "grid"), alone_in(tmp_path):
        runner(tmp_path).run(jobs_of(ROWS[:1], (0,)))
    assert starts(tmp_path) == ["a/seed0"]


def test_kernels_that_cannot_be_compiled_are_told(tmp_path, repository, capsys):
    open_checkout(tmp_path / "grid", root=repository)
    assert re.search(r"warning: no kernels were compiled in .*/code, .*setup.py", capsys.readouterr().out)
    kernels = repository / "lbsgd" / "data" / "native" / "_kernels.so"
    kernels.parent.mkdir(parents=True)
    kernels.touch()
    git(repository, "add", ".")
    change(repository)
    open_checkout(tmp_path / "other", root=repository)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", ['<<<<<<< HEAD\n{"commit": "a"}\n=======\n', "[" * 100_000])
def test_a_note_that_is_broken_as_by_the_marks_of_a_merge_is_refused(tmp_path, repository, content):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "grid.json").write_text(content)
    with pytest.raises(ConfigError, match="results/grid.json does not say the commit of the runs beside it"):
        open_checkout(tmp_path / "grid", tmp_path / "results", repository)


def test_a_folder_that_cannot_be_written_is_told_in_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    places = ["--work_dir", str(tmp_path / "file"), "--results", str(tmp_path / "results")]
    assert main(["reproduce", "table1", "digits", *places]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: reproduce: .*/file/\S+: Not a directory; .* with --work_dir or --results\n", said)


def test_a_grid_that_is_told_to_stop_before_its_first_run_ends_as_one_that_runs(number, monkeypatch, capsys):
    handler = signal.getsignal(number)
    monkeypatch.setattr("lbsgd.experiments.reproduce.reproduce", lambda request: signal.raise_signal(number))
    assert main(["reproduce", "table1", "digits"]) == 75
    assert capsys.readouterr().err == f"stopped: {number.name}; the same command goes on\n"
    assert signal.getsignal(number) == handler


def test_runs_are_told_to_stop_while_they_take_it_for_the_same_ctrl_c(tmp_path, monkeypatch):
    monkeypatch.setattr("lbsgd.experiments.runner.LOOK_SECONDS", 60.0)
    threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
    began = time.monotonic()
    with pytest.raises(Stopped):
        runner(tmp_path).run(jobs_of(ROWS, (0, 1)))
    assert time.monotonic() - began < 30  # including the time that the fake recipe takes


def test_gpus_are_those_that_the_user_was_given(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-abc")
    machine = Machine.here(DIGITS, 4)
    assert [machine.gpu_of(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(4)] == ["2", "GPU-abc", "2", "GPU-abc"]
    assert Machine.here(DIGITS, 1).gpu_of(0) == {}
    assert Machine.here(DIGITS, None).side_by_side == 2


@pytest.mark.parametrize("listed, expected", [("-1", ()), ("", ()), ("2,-1,3", ("2",)), ("2, 3", ("2", "3"))])
def test_gpus_end_at_a_negative_number_as_cuda_has_it(monkeypatch, listed, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert launch.visible_gpus() == expected


def test_a_run_on_several_gpus_takes_those_that_the_user_was_given(tmp_path, monkeypatch):
    imagenet = DATA_SETS["imagenet"]
    job = jobs_of(STUDIES["table1"].rows(imagenet), (0,))[0]

    def command():
        return launch.command(job, Grid(imagenet, tmp_path, tmp_path, Machine.here(imagenet, None)))

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert command()[1:3] == ["--include", "localhost:4,5,6,7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert command()[1:3] == ["--include", "localhost:4,5"]  # 8 workers cannot be divided among 3 GPUs
    with pytest.raises(ConfigError, match="a run of imagenet takes all GPUs; leave --side_by_side out"):
        Machine.here(imagenet, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-abc,GPU-def")
    with pytest.raises(ConfigError, match="has GPU-abc; DeepSpeed's launcher takes numbers alone"):
        command()


def test_an_error_of_an_earlier_start_is_not_told_of_this_one(tmp_path, monkeypatch):
    (tmp_path / "a/seed1").mkdir(parents=True)
    (tmp_path / "a/seed1/output.txt").write_text("error: of the start before\n")
    monkeypatch.setenv("BEHAVIOUR", "fail")
    with pytest.raises(TrainingError, match="a/seed1: error: cannot read the data"):
        runner(tmp_path).run(jobs_of(ROWS[:1], (1,)))


@pytest.mark.parametrize("flag", ["--side_by_side", "--epochs"])
def test_no_runs_and_no_epochs_are_refused(capsys, flag):
    with pytest.raises(SystemExit):
        main(["reproduce", "table1", "digits", flag, "0"])
    assert "is not a whole number of at least 1" in capsys.readouterr().err


def test_more_epochs_than_a_row_has_are_refused_before_anything_is_made(capsys, tmp_path):
    command = ["reproduce", "table1", "digits", "--epochs", "31", "--work_dir", str(tmp_path)]
    for more in (["--list"], []):
        assert main([*command, *more]) == 2
        assert "--epochs 31 is more than the 30 of x1; it ends runs earlier" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_lists_its_runs_and_refuses_what_it_does_not_know(capsys):
    assert main(["reproduce", "table1", "digits", "--list", "--seeds", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and all("recipes/digits.py" in line for line in lines)
    assert main(["reproduce", "table9", "digits"]) == 2
    assert "no experiment 'table9'; there are table1" in capsys.readouterr().err
    assert main(["reproduce", "table1", "mnist"]) == 2
    assert "no data set 'mnist'; there are digits" in capsys.readouterr().err
    assert main(["reproduce", "digits", "table1"]) == 2
    assert "digits is a data set, and one of them comes last" in capsys.readouterr().err
    assert main(["reproduce", "baseline_lr", "table1", "digits"]) == 2
    assert "the runs of table1 are of another grid than those of baseline_lr" in capsys.readouterr().err
    assert seeds("3") == (0, 1, 2) and seeds("5-7") == (5, 6, 7)


@pytest.mark.parametrize(
    "text, words",
    [
        ("10000000000000", "at most 10,000"),
        ("10001", "at most 10,000"),
        ("0-10000", "at most 10,000"),
        (f"5-{'9' * 30}", "at most 10,000"),
        ("9" * 5000, "at most 10,000"),  # more digits than Python reads
        ("٣", "neither a number of seeds"),
        ("1-", "neither a number of seeds"),
        ("7-5", "at least 1"),
        ("4294967295-4294967296", "above 4294967295, which no recipe takes"),
    ],
)
def test_seeds_that_nobody_can_run_are_one_line(capsys, text, words):
    with pytest.raises(SystemExit) as caught:
        main(["reproduce", "table1", "digits", "--list", "--seeds", text])
    error = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2 and "--seeds" in error and words in error
    assert len(seeds("10000")) == len(seeds("2-10001")) == 10_000 and seeds("4294967295-4294967295") == (2**32 - 1,)


def test_listed_commands_can_be_pasted_where_they_are_listed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "table1", "digits", "--list", "--seeds", "1"]) == 0
    _, recipe, *flags = shlex.split(capsys.readouterr().out.splitlines()[0])
    paths = {flag: os.path.abspath(value) for flag, value in zip(flags[:-1:2], flags[1:-1:2], strict=True)}
    assert os.path.abspath(recipe) == str(ROOT / "recipes" / "digits.py")
    assert paths["--deepspeed_config"] == str(ROOT / "ds_configs" / "digits" / "256.json")
    assert paths["--data_dir"] == str(ROOT / "data" / "digits_1536_ffcv")
    assert paths["--output_dir"] == str(ROOT / "runs" / "reproduce" / "digits" / "x1" / "seed0")


@pytest.mark.parametrize("flags", [(), ("--list",)])
def test_an_installed_wheel_says_that_the_clone_is_needed(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.setattr("lbsgd.experiments.reproduce.ROOT", tmp_path)
    places = ["--work_dir", str(tmp_path), "--results", str(tmp_path / "results")]
    assert main(["reproduce", "table1", "digits", *places, *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: reproduce: needs a git clone of the repository") and said.count("\n") == 1


def test_what_cannot_be_is_not_listed(capsys):
    assert main(["reproduce", "table3b", "digits", "--list"]) == 2
    assert "table3b compares detectors, and digits is no data set for these" in capsys.readouterr().err
    assert main(["reproduce", "async", "cifar10", "--list"]) == 2
    assert "async has nothing to run on cifar10" in capsys.readouterr().err


@pytest.mark.slow
def test_table_1_of_digits_runs_and_is_reported(tmp_path, capsys):
    command = ["reproduce", "table1", "digits", "--seeds", "1", "--epochs", "1", "--work_dir", str(tmp_path)]
    assert main([*command, "--results", str(tmp_path / "results")]) == 0
    grid = tmp_path / "runs" / "reproduce" / "digits_1_epochs"
    assert len(list(grid.glob("*/seed0/log.jsonl"))) == len(list(grid.glob("*/seed0/weights.pt"))) == 4
    said = capsys.readouterr().out
    assert "| gradual warmup | 8,192 | 3.2 | 23.74 ± 0.09 | 256 | 1.6 |" in said and "not known yet" in said
    assert (grid / "table1" / "index.html").exists() and not (tmp_path / "results").exists()
    git(ROOT, "worktree", "remove", "--force", str(grid / "code"))


@pytest.mark.slow
@pytest.mark.parametrize("study", ["async", "update-magnitude"])
def test_simulated_studies_run_and_are_reported(tmp_path, study):
    command = ["reproduce", study, "digits", "--seeds", "1", "--epochs", "1", "--work_dir", str(tmp_path)]
    assert main([*command, "--results", str(tmp_path / "results")]) == 0
    [grid] = (tmp_path / "runs/reproduce").iterdir()
    assert (grid / study / "index.html").read_text().count("<figure") >= 2
    git(ROOT, "worktree", "remove", "--force", str(grid / "code"))
