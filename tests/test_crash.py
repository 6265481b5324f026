"""Runs in real processes that are killed, stopped, broken or made to hang: nothing is lost, nobody waits, the cause is told.

Kills come at random; `LBSGD_CRASH_SEED=...`, which a failing test prints, repeats them as far as time can be repeated.
"""

import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from crash import RECIPE, SMALL, Command, completed, config
from oracle import BOUND, distance

import lbsgd.data.fake
import lbsgd.processes.first_cause
import lbsgd.processes.guard
import lbsgd.processes.peers
import lbsgd.train.trainer
from lbsgd.errors import DataError
from lbsgd.processes.environment import free_port
from lbsgd.report.run_log import read_run
from lbsgd.train import checkpoint

SEED = int(os.environ.get("LBSGD_CRASH_SEED") or random.SystemRandom().randrange(10_000))
EVERY = ("--checkpoint_every", 7)
ITERATIONS = 40  # an epoch; there are two
HOST = socket.gethostname()


@pytest.fixture
def rng():
    print(f"LBSGD_CRASH_SEED={SEED}")
    return random.Random(SEED)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return config(tmp_path_factory.mktemp("config"), iterations=ITERATIONS)


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    completed(small, folder, *EVERY)
    return folder


def weights(folder):
    return torch.load(folder / "weights.pt", weights_only=True)


def newest(folder):
    """Tensors and state of the newest checkpoint."""
    return checkpoint.load(checkpoint.newest(folder / "checkpoints"))


def saved_iteration(folder):
    return newest(folder)[1]["counters"]["iteration"]


def assert_same_bits(tensors, others, names=None):
    assert tensors.keys() == others.keys()
    assert [name for name in names or tensors if not torch.equal(tensors[name], others[name])] == []


def assert_same_run(folder, whole):
    """The same weights, statistics, momentum, random states, counters and log, to the last bit."""
    assert_same_bits(weights(folder), weights(whole))
    (tensors, state), (expected, expected_state) = newest(folder), newest(whole)
    for kind in ("weights", "momentum"):
        assert_same_bits(tensors[kind], expected[kind])
    assert_same_bits(tensors["random"], expected["random"], ["torch.0", "torch.1"])  # nobody seeds NumPy's and Python's
    for key in ("counters", "identity", "epoch_totals", "num_threads"):
        assert state[key] == expected_state[key]
    assert_same_log(folder, whole)


def assert_same_log(folder, whole, statistics=True):
    """One run to read: each iteration and each epoch once, with the numbers of the other run, all but times."""
    keys = {
        "iterations": ("iteration", "epoch", "lr", "train_loss"),
        "epochs": ("epoch", "iteration", "train_loss", "train_top1_error_pct")
        + statistics * ("val_loss", "val_correct_top1"),
    }
    log, expected = read_run(folder), read_run(whole)
    for kind, names in keys.items():
        ours, theirs = ([[record[name] for name in names] for record in getattr(run, kind)] for run in (log, expected))
        assert ours == theirs
    assert log.result and (not statistics or log.result["val_top1_error_pct"] == expected.result["val_top1_error_pct"])


def assert_same_parameters(folder, whole):
    """Where one run has saved more often: batch norm's statistics are averaged at each save, which moves their last bits."""
    parameters = newest(whole)[0]["momentum"].keys()
    assert len(parameters) > 10
    assert_same_bits(weights(folder), weights(whole), parameters)
    assert_same_bits(newest(folder)[0]["momentum"], newest(whole)[0]["momentum"])
    assert_same_log(folder, whole, statistics=False)


# --- SIGKILL ----------------------------------------------------------------------------------------------------------


def killed_run(json, folder, kills, rng, last, *flags):
    """A run killed so many times and resumed: both processes, or one of the two."""
    victims = [(0, 1), (0,), (1,)] * kills
    for number, ranks in enumerate(rng.sample(victims[:kills], kills)):
        done = checkpoint.newest(folder / "checkpoints")
        done = int(done.name[10:18]) if done else 0
        share = (last - done) / (kills - number + 1)
        kill(json, folder, done, min(last - 20, done + rng.randint(1, max(1, int(2 * share)))), ranks, rng, *flags)
    completed(json, folder, "--resume", *flags)


def kill(json, folder, done, iteration, ranks, rng, *flags):
    """Goes on with a run and kills some of its processes a moment after an iteration; the others must end by themselves."""
    with Command(json, folder, "--resume", *flags) as run:
        run.wait_for_iteration(iteration) if iteration > done else run.wait_for("resuming from")
        time.sleep(rng.uniform(0, 0.03))  # an iteration takes 0.02 s: in the middle of a pass, of a save, ...
        run.send(signal.SIGKILL, *ranks)
        codes = run.exit_codes(within=30)
    assert codes == [-signal.SIGKILL if rank in ranks else 4 for rank in run.ranks], run.console
    dead = "rank 0, or the way to its host, is gone" if 0 in ranks else f"rank 1 on {HOST} died or does not answer"
    assert len(run.errors) == (len(ranks) < 2) and all(dead in error for error in run.errors), run.errors


def test_a_run_killed_three_times_ends_in_the_same_bits(small, whole, tmp_path, rng):
    killed_run(small, tmp_path / "run", 3, rng, 2 * ITERATIONS, *EVERY)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_run_killed_twenty_times_ends_in_the_same_bits(tmp_path, rng, stage):
    json = config(tmp_path, stage=stage, iterations=150)
    completed(json, tmp_path / "whole", *EVERY)
    killed_run(json, tmp_path / "run", 20, rng, 300, *EVERY)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_runs_killed_at_any_time_for_minutes_end_in_the_same_bits(tmp_path, rng):
    """Also while they start, resume, evaluate and export; saving each iteration, or by the clock."""
    json, began, kills, runs = config(tmp_path, iterations=150), time.monotonic(), 0, 0
    completed(json, tmp_path / "whole", "--checkpoint_every", 1)
    while time.monotonic() - began < float(os.environ.get("LBSGD_SOAK_SECONDS") or 300):
        runs, folder, every = runs + 1, tmp_path / f"run_{runs}", rng.choice([1, "0.005m"])
        while killed_at_any_time(json, folder, rng, "--checkpoint_every", every):
            kills += 1
        (assert_same_run if every == 1 else assert_same_parameters)(folder, tmp_path / "whole")
        shutil.rmtree(folder)
    print(f"{runs} runs, {kills} times killed")


def killed_at_any_time(json, folder, rng, *flags):
    """Goes on with a run and kills processes of it within seconds; False where it had come to its end before."""
    with Command(json, folder, "--resume", *flags) as run:
        deadline = time.monotonic() + rng.uniform(0, 5)
        while (alive := run.alive()) and time.monotonic() < deadline:
            time.sleep(0.001)
        # Without a launcher nobody knows of a process that dies before it has met the others.
        victims = [rank for rank in alive if rng.random() < 0.7 or not run.iterations()]
        run.send(signal.SIGKILL, *victims)
        codes = dict(zip(run.ranks, run.exit_codes(within=60)))
    assert all(codes[rank] in ((-signal.SIGKILL,) if rank in victims else (0, 4)) for rank in codes), run.console
    return bool(victims)


@pytest.mark.slow
def test_a_run_on_ffcv_data_killed_three_times_ends_in_the_same_bits(digits_data, tmp_path, rng):
    json = config(tmp_path, iterations=1437 // 16)
    flags = ("--data_dir", digits_data, *EVERY)
    completed(json, tmp_path / "whole", *flags)
    killed_run(json, tmp_path / "run", 3, rng, 2 * (1437 // 16), *flags)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


# --- another world size -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eighteen_iterations(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eighteen") / "run"
    completed(small, folder, "--max_iterations", 18, recipe=SMALL)
    return folder


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_run_goes_on_on_another_number_of_processes_with_the_same_images(eighteen_iterations, tmp_path, stage):
    """Two processes, then one, then two; without dropout, whose masks belong to processes. DeepSpeed alone refuses stages 1, 2."""
    json, folder = config(tmp_path, stage=stage, iterations=ITERATIONS), tmp_path / "run"
    for world_size, last in ((2, 6), (1, 12), (2, 18)):
        completed(json, folder, "--resume", "--max_iterations", last, world_size=world_size, recipe=SMALL)
    ours, theirs = (
        {name: tensor for name, tensor in weights(run).items() if "num_batches_tracked" not in name}
        for run in (folder, eighteen_iterations)
    )
    assert distance(ours, theirs) < BOUND
    ours, theirs = (
        [record["train_loss"] for record in read_run(run).iterations] for run in (folder, eighteen_iterations)
    )
    assert len(ours) == 18 and ours == pytest.approx(theirs, rel=BOUND)


# --- SIGTERM, SIGUSR1 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, rank", [(signal.SIGTERM, 0), (signal.SIGUSR1, 1)])
def test_a_signal_to_one_process_saves_the_run_and_ends_all(small, whole, tmp_path, rng, number, rank):
    with Command(small, tmp_path / "run", *EVERY, fault=slow_iterations) as run:
        run.wait_for_iteration(rng.randint(3, 30))
        run.send(number, rank)
        assert run.exit_codes(within=30) == [75, 75], run.console
    [said] = run.errors
    reason, iterations = re.fullmatch(
        r"stopped: (.+): saved after (\d+) iterations; the same command with --resume goes on", said
    ).groups()
    assert reason in (number.name, "another process was told to") and int(iterations) == saved_iteration(
        tmp_path / "run"
    )
    completed(small, tmp_path / "run", *EVERY, "--resume")
    assert_same_parameters(tmp_path / "run", whole)


def writes_slowly():
    slow_iterations(), evaluation_never_ends()
    write = checkpoint.write

    def slow(path, data):
        time.sleep(0.3)
        return write(path, data)

    checkpoint.write = slow


@pytest.mark.parametrize("iteration", [5, ITERATIONS])
def test_no_process_ends_before_the_checkpoint_is_written(small, tmp_path, iteration):
    """In an epoch or at its end: a launcher sends SIGTERM to all others, and soon SIGKILL, as soon as one has ended."""
    with Command(small, tmp_path / "run", fault=writes_slowly) as run:
        run.wait_for_iteration(iteration)
        run.send(signal.SIGTERM, 0, 1)
        run.wait_until(lambda: len(run.alive()) < 2, "end")
        assert checkpoint.newest(tmp_path / "run/checkpoints"), "a process has ended, and nothing is saved yet"
        assert run.exit_codes(within=30) == [75, 75]


def passes_of_iteration_2_are_slow():
    """32 passes of 0.5 s, where others take 0.01 s; the processes agree after each one or two."""
    lbsgd.train.trainer.AGREE_SECONDS = 0.01

    def slowly(trainer):
        if trainer.iteration == 2:
            print("a slow pass")
            time.sleep(0.5)

    before_each_pass(slowly)


def test_a_stop_gives_up_an_iteration_of_many_passes_and_it_is_done_again(tmp_path):
    json, folder = config(tmp_path, global_batch=256, iterations=3), tmp_path / "run"
    completed(json, tmp_path / "whole")
    with Command(json, folder, fault=passes_of_iteration_2_are_slow) as run:
        run.wait_until(lambda: run.printed(1).count("a slow pass") == 3, "slow passes")
        run.send(signal.SIGTERM, 1)
        assert run.exit_codes(within=30) == [75, 75], run.console
    assert run.printed(1).count("a slow pass") < 10
    assert "saved after 2 iterations" in run.errors[0] and saved_iteration(folder) == 2
    completed(json, folder, "--resume")
    assert_same_parameters(folder, tmp_path / "whole")


def passes_become_twenty_times_slower():
    """From 0.02 s to 0.4 s, just when the processes have agreed to go on."""
    agree, pause = lbsgd.train.trainer.Trainer.agree, [0.02]

    def agree_and_slow_down(self, *arguments):
        agree(self, *arguments)
        if self.iteration > 50 and self.passes_since == 0 and pause[0] < 0.4:
            pause[0] = 0.4
            print("slower")

    lbsgd.train.trainer.Trainer.agree = agree_and_slow_down
    before_each_pass(lambda trainer: time.sleep(pause[0]))


def test_passes_that_become_much_slower_at_once_do_not_keep_a_run_from_saving_in_time(tmp_path):
    """How often the processes agree follows the past speed of passes; the guard gives up after 25 seconds."""
    json, folder = config(tmp_path, iterations=200), tmp_path / "run"
    with Command(json, folder, fault=passes_become_twenty_times_slower) as run:
        run.wait_for("slower")
        run.send(signal.SIGTERM, 1)
        assert run.exit_codes(within=30) == [75, 75], run.console
    assert saved_iteration(folder) > 50


def iteration_3_never_ends():
    def never(trainer):
        if trainer.iteration == 3:
            print("waiting for ever")
            time.sleep(1000)

    before_each_pass(never)


def test_a_second_signal_ends_a_process_at_once(small, tmp_path):
    with Command(small, tmp_path / "run", fault=iteration_3_never_ends) as run:
        for rank in (0, 1):
            run.wait_for("waiting for ever", rank)
        began = time.monotonic()
        while alive := run.alive():
            run.send(
                signal.SIGTERM, *alive
            )  # those within a second count as one: a launcher passes on what a terminal sends
            time.sleep(0.2)
            assert time.monotonic() - began < 10, run.console
        assert time.monotonic() - began > 1
        assert run.exit_codes() == [75, 75] and "by a second signal, SIGTERM; nothing was saved" in run.errors[0]


# --- the launcher -----------------------------------------------------------------------------------------------------


class LauncherDies:
    """The launcher that started the processes, here another one's number, has died when they have imported all they need."""

    def __init__(self, pid):
        self.pid = pid

    def __call__(self):
        slow_iterations()
        launcher, start = psutil.Process(self.pid), lbsgd.train.run.Run.start
        lbsgd.train.run.launchers = lambda: [launcher] if launcher.status() != psutil.STATUS_ZOMBIE else []

        def too_late(run):
            launcher.kill()
            start(run)

        lbsgd.train.run.Run.start = too_late


def test_a_launcher_that_dies_while_the_processes_start_is_missed(small, tmp_path):
    with subprocess.Popen(["sleep", "1000"]) as launcher:
        with Command(small, tmp_path / "run", ranks=[0], world_size=1, fault=LauncherDies(launcher.pid)) as run:
            assert run.exit_codes(within=30) == [75], run.console
        launcher.kill()
    assert run.errors[0].startswith(f"stopped: its launcher (process {launcher.pid}) is gone")


class Launched:
    """A long run as DeepSpeed's command starts it; its processes once they train, or import, and none of them on leaving."""

    def __init__(self, folder, *flags, importing=False):
        self.run, self.flags, self.printed, self.importing = folder / "run", flags, folder / "console", importing
        self.json = config(folder, iterations=5000)

    def __enter__(self):
        with self.printed.open("w") as console:
            self.command = subprocess.Popen(
                [
                    Path(sys.executable).with_name("deepspeed"),
                    "--quiet",
                    "--num_accelerators",
                    "2",
                    "--master_port",
                    str(free_port()),
                    RECIPE,
                    "--deepspeed_config",
                    self.json,
                    "--fake_data",
                    "--output_dir",
                    self.run,
                    *self.flags,
                ],
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        try:
            self.wait_for(
                lambda: "\noutput  " in self.printed.read_text() if self.importing else self.lines_of_log() > 3
            )
            mine = [
                process for process in psutil.Process().children(recursive=True) if str(self.run) in process.cmdline()
            ]
            self.deepspeed, self.launch, *self.ranks = sorted(
                mine, key=lambda process: (process.create_time(), process.pid)
            )
            assert "deepspeed.launcher.launch" in self.launch.cmdline() and len(self.ranks) == 2
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        try:
            os.killpg(self.command.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.command.wait()

    def lines_of_log(self):
        log = self.run / "log.jsonl"
        return len(log.read_bytes().splitlines()) if log.exists() else 0

    def wait_for(self, true):
        deadline = time.monotonic() + 120
        while not true():
            assert self.command.poll() is None and time.monotonic() < deadline, self.printed.read_text()
            time.sleep(0.01)

    def errors_at_the_end(self, within=30):
        """What launch.py's processes print when they end; fails where one is left after so many seconds."""
        assert psutil.wait_procs([self.launch, *self.ranks], timeout=within)[1] == [], self.printed.read_text()
        return [
            line
            for line in self.printed.read_text().splitlines()
            if line.startswith(("error: ", "stopped: ", "ended: "))
        ]


@pytest.mark.parametrize("dies", [pytest.param("deepspeed", marks=pytest.mark.slow), "launch.py"])
def test_a_run_whose_launcher_was_killed_saves_and_ends(tmp_path, dies):
    """The kernel tells the ranks about the death of their parent, launch.py, and they look for `deepspeed` above it."""
    with Launched(tmp_path) as run:
        (run.launch if dies == "launch.py" else run.deepspeed).kill()
        [error] = run.errors_at_the_end()
    reason = "SIGTERM" if dies == "launch.py" else rf"its launcher \(process {run.deepspeed.pid}\) is gone"
    # Rank 0 speaks, and may have learnt it from the other one a moment before it found out by itself.
    [saved] = re.findall(rf"stopped: (?:{reason}|another process was told to): saved after (\d+) iterations", error)
    assert int(saved) == saved_iteration(run.run)


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["deepspeed", "launch.py"])
def test_a_launcher_that_is_killed_during_the_imports_leaves_no_process_behind(tmp_path, dies):
    with Launched(tmp_path, importing=True) as run:
        time.sleep(1)  # rank 1 may have begun a little later; PyTorch takes some seconds more
        assert not run.lines_of_log()
        (run.launch if dies == "launch.py" else run.deepspeed).kill()
        errors = run.errors_at_the_end()
    if dies == "deepspeed":  # the kernel's SIGTERM for launch.py's death comes before anybody is there to tell
        assert len(errors) == 1 and f"its launcher (process {run.deepspeed.pid}) is gone at the " in errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("number, to_all", [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True)])
def test_a_signal_to_the_launcher_or_to_all_saves_and_ends_the_run(tmp_path, number, to_all):
    """launch.py alone passes SIGTERM on; a scheduler's SIGTERM, or Ctrl-C, reaches all processes, and launch.py adds its own."""
    with Launched(tmp_path) as run:
        os.killpg(run.command.pid, number) if to_all else os.kill(run.launch.pid, number)
        [error] = run.errors_at_the_end()
    [saved] = re.findall(r"stopped: .+: saved after (\d+) iterations", error)
    assert int(saved) == saved_iteration(run.run)


@pytest.mark.slow
@pytest.mark.parametrize("number, within", [(signal.SIGKILL, 20), (signal.SIGSTOP, 70)])
def test_under_the_launcher_a_process_that_dies_or_stops_ends_all(tmp_path, number, within):
    """launch.py kills a process that is stopped 30 s after it has asked it to end, which it does once another has ended."""
    with Launched(tmp_path, "--hang_timeout", "10") as run:
        run.ranks[1].send_signal(number)
        [error] = run.errors_at_the_end(within)
    assert f"error: rank 1 on {HOST} died or does not answer since iteration" in error


# --- the evaluation ---------------------------------------------------------------------------------------------------


def evaluation_never_ends():
    batches = lbsgd.data.fake.FakeEval.__iter__

    def some(self):
        yield next(batches(self))
        print("evaluating")
        time.sleep(1000)

    lbsgd.data.fake.FakeEval.__iter__ = some


@pytest.mark.parametrize("number, ranks", [(signal.SIGKILL, (0, 1)), (signal.SIGTERM, (0,)), (signal.SIGTERM, (1,))])
def test_a_run_that_ended_in_an_evaluation_evaluates_again(small, whole, tmp_path, number, ranks):
    with Command(small, tmp_path / "run", *EVERY, fault=evaluation_never_ends) as run:
        for rank in (0, 1):
            run.wait_for("evaluating", rank)
        run.send(number, *ranks)
        codes = run.exit_codes(within=10)
    if number == signal.SIGTERM:
        assert codes == [75, 75], run.console
        assert run.errors == ["stopped: SIGTERM at evaluation, batch 0; the same command with --resume goes on"]
    assert read_run(tmp_path / "run").epochs == [] and saved_iteration(tmp_path / "run") == ITERATIONS
    if number == signal.SIGKILL:
        completed(small, tmp_path / "run", *EVERY, "--resume")
        assert_same_run(tmp_path / "run", whole)


# --- a process that breaks --------------------------------------------------------------------------------------------


class Breaks:
    """An exception in iteration 5 of one rank."""

    def __init__(self, rank, error):
        self.rank, self.error = rank, error

    def __call__(self):
        def breaks(trainer):
            if trainer.iteration == 5 and int(os.environ["RANK"]) == self.rank:
                raise self.error

        before_each_pass(breaks)


@pytest.mark.parametrize(
    "rank, error, code, words",
    [
        (1, ZeroDivisionError("a bug"), 1, "ZeroDivisionError: a bug"),
        (0, DataError("cannot decode"), 2, "cannot decode"),
    ],
)
def test_what_one_process_raises_ends_all_with_its_code_and_is_told_once(small, tmp_path, rank, error, code, words):
    with Command(small, tmp_path / "run", fault=Breaks(rank, error)) as run:
        assert run.exit_codes(within=30) == [code, code], run.console
    assert run.errors == [f"error: {words}"] and run.errors[0] in run.printed(rank)
    assert ("Traceback" in run.printed(rank)) == (code == 1) and "Traceback" not in run.printed(1 - rank)


def ffcv_thread_breaks():
    """The thread that decodes, of rank 1, raises after the first batches."""
    if os.environ["RANK"] != "1":
        return
    import lbsgd.data.ffcv_loader

    real = lbsgd.data.ffcv_loader.EpochIterator.run_pipeline

    def breaks(self, batch_slot, *arguments):
        if batch_slot == 2:
            raise OSError("the disk is gone")
        return real(self, batch_slot, *arguments)

    lbsgd.data.ffcv_loader.EpochIterator.run_pipeline = breaks


@pytest.mark.slow
def test_a_loader_thread_that_raises_ends_all(digits_data, tmp_path):
    with Command(
        config(tmp_path, iterations=89), tmp_path / "run", "--data_dir", digits_data, fault=ffcv_thread_breaks
    ) as run:
        assert run.exit_codes(within=PATIENT) == [2, 2], run.console
    assert "the disk is gone" in run.errors[0] and len(run.errors) == 1


PATIENT = 120  # Numba compiles first


def impatient():
    """The guard's own times, all of them shorter."""
    slow_iterations()
    lbsgd.processes.peers.Peers.BEAT_SECONDS = lbsgd.processes.guard.LAST_WORDS_SECONDS = 0.5
    lbsgd.processes.first_cause.FIRST_CAUSE_SECONDS = 4.5


def test_a_process_that_stops_answering_is_named_within_the_timeout(small, tmp_path):
    """SIGSTOP to rank 1 in one run, and to rank 0, which serves the store, in another."""
    flags = ("--hang_timeout", 5)
    with (
        Command(small, tmp_path / "a", *flags, fault=impatient) as one,
        Command(small, tmp_path / "b", *flags, fault=impatient) as two,
    ):
        for run, stopped in ((one, 1), (two, 0)):
            run.wait_for_iteration(5)
            run.send(signal.SIGSTOP, stopped)
        began = time.monotonic()
        for run, stopped in ((one, 1), (two, 0)):
            run.processes[1 - stopped].join(40)
            assert run.processes[1 - stopped].exitcode == 4, run.console
        assert time.monotonic() - began < 15
        assert f"error: rank 1 on {HOST} died or does not answer since iteration" in one.console
        assert "error: nothing has moved for 5 s since iteration" in two.console and len(two.errors) == 1
        for run, stopped in ((one, 1), (two, 0)):
            run.send(signal.SIGCONT, stopped)  # one that wakes up too late finds the others gone, and goes, too
            assert run.exit_codes(within=20) == [4, 4]


def slow_iterations():
    """So that a run lasts until it is stopped, on any machine, and the processes agree after each few of them."""
    lbsgd.train.trainer.AGREE_SECONDS = 0.1
    before_each_pass(lambda trainer: time.sleep(0.025))


def before_each_pass(act):
    """Calls act(trainer) before the trainer waits for a pass's images."""
    wait_for = lbsgd.train.trainer.Trainer.wait_for

    def act_and_wait(trainer, batches):
        act(trainer)
        return wait_for(trainer, batches)

    lbsgd.train.trainer.Trainer.wait_for = act_and_wait


# --- before the processes have met ------------------------------------------------------------------------------------


def test_a_process_that_does_not_come_is_named(small, tmp_path):
    with Command(small, tmp_path / "run", "--hang_timeout", 2, ranks=[0]) as run:
        assert run.exit_codes(within=20) == [4], run.console
    assert "of 2 processes some did not come within 2 s: rank 1; look at their hosts" in run.errors[0]


class OtherFlags:
    """Flags that one rank alone is given; each rank is a host of its own, named after it."""

    def __init__(self, rank, *flags):
        self.rank, self.flags = rank, flags

    def __call__(self):
        socket.gethostname = lambda: f"host{os.environ['RANK']}"
        if int(os.environ["RANK"]) == self.rank:
            sys.argv += self.flags


def test_a_host_with_another_configuration_is_named_on_all_hosts(small, tmp_path):
    with Command(small, tmp_path / "run", fault=OtherFlags(1, "--seed", "1"), LOCAL_SIZE=1) as run:
        assert run.exit_codes(within=30) == [2, 2]
    told = "rank 1 on host1 does not have the configuration of rank 0 on host0; make them the same on all hosts"
    assert run.errors == [f"ended: by rank 1 on host1: {told}", f"error: {told}"]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_host_before_the_processes_meet_ends_the_others(small, tmp_path, rank):
    fault = OtherFlags(rank, "--expect_world_size", "3")
    with Command(small, tmp_path / "run", fault=fault, LOCAL_SIZE=1) as run:
        run.processes[1 - rank].join(15)
        assert run.processes[1 - rank].exitcode == 2, run.console
    [told] = [line for line in run.errors if line.startswith("error: --expect_world_size is 3, but 2 processes run")]
    assert sorted(run.errors) == sorted([told, told.replace("error: ", f"ended: by rank {rank} on host{rank}: ")])
    assert told in run.printed(rank)


# --- the disk ---------------------------------------------------------------------------------------------------------


def disk_fails_for_a_while():
    """No file of more than 90 kB can be written from iteration 22 to 39, such as weights.safetensors; the log is smaller."""
    if os.environ["RANK"] != "0":
        return
    report = lbsgd.train.trainer.Trainer.report_iteration

    def and_limit(self, iteration):
        report(self, iteration)
        if iteration in (22, 39):
            self.saver.wait()  # iteration 21's checkpoint may still be on its way
            resource.setrlimit(resource.RLIMIT_FSIZE, (90_000 if iteration == 22 else -1, -1))

    lbsgd.train.trainer.Trainer.report_iteration = and_limit


def test_a_disk_that_fails_for_a_while_loses_nothing(small, whole, tmp_path):
    with Command(small, tmp_path / "run", *EVERY, fault=disk_fails_for_a_while) as run:
        run.wait_for("iteration 28 could not be written")
        held = checkpoint.newest(tmp_path / "run/checkpoints")
        run.finish()
    assert held.name == "iteration_00000021"
    failed = re.findall(
        r"warning: the checkpoint of iteration (\d+) could not be written \(.*File too large\); the one before it "
        r"stands, training goes on, and the next one is tried",
        run.console,
    )
    assert failed == ["28", "35"]
    assert_same_run(tmp_path / "run", whole)


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(small, whole, copy):
    damaged = checkpoint.newest(copy / "checkpoints") / "momentum.safetensors"
    flip_a_bit(damaged)
    run = completed(small, copy, *EVERY, "--resume")
    assert f"warning: {damaged} is not as it was written" in run.console and "resuming from" in run.console
    assert f"{copy}/checkpoints/iteration_00000075" in run.console
    assert_same_run(copy, whole)


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda path: flip_a_bit(path / "weights.safetensors"), "weights.safetensors is not as it was written"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json'"),
    ],
    ids=["a flipped bit", "no manifest"],
)
def test_with_no_whole_checkpoint_left_a_run_stops_rather_than_starts_over(small, copy, damage, told):
    for path in checkpoint.complete(copy / "checkpoints"):
        damage(path)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with Command(small, copy, *EVERY, "--resume") as run:
        assert run.exit_codes(within=60) == [2, 2]
    [error] = run.errors
    assert error.count(told) == 3 and "no whole checkpoint is left" in error
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
