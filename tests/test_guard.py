"""The threads that end a process, and what processes tell each other outside collective calls."""

import io
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import Mock

import psutil
import pytest
import torch
from commands import ROOT
from crash import PATIENCE_SECONDS, forked, lines_that_end
from torch.distributed import HashStore, TCPStore

from lbsgd.config.plan import Plan
from lbsgd.errors import ConfigError, DataError, LbsgdError, LostProcessError, Stopped, TrainingError, print_error
from lbsgd.processes import first_cause as first_cause_module
from lbsgd.processes import guard as guard_module
from lbsgd.processes import peers as peers_module
from lbsgd.processes.ending import end_at_a_signal
from lbsgd.processes.environment import Processes
from lbsgd.processes.guard import Guard
from lbsgd.processes.peers import OtherFailed, Peers
from lbsgd.processes.ports import free_port
from lbsgd.processes.signals import STOP_SIGNALS, StopSignals
from lbsgd.train.facts import fingerprints

ALONE = Processes(rank=0, world_size=1, local_rank=0, local_world_size=1)


def two_peers(store=None, hosts=("alpha", "beta")):
    """Return both of two processes on two hosts that have met at a store of this process."""
    store = store or HashStore()
    met = []
    for rank, host in enumerate(hosts):
        met.append(Peers(Processes(rank, 2, 0, 1), store))
        store.set(f"host/{rank}", host)
    return met


# --- peers -----------------------------------------------------------------------------------------------------------


def test_what_differs_between_hosts_is_named():
    first, second = two_peers()
    first.agree({"configuration": "1f", "data": "e0"})
    second.agree({"configuration": "1f", "data": "e0"})
    with pytest.raises(
        ConfigError, match="rank 1 on beta does not have the data of rank 0 on alpha; make them the same on all"
    ):
        second.agree({"configuration": "1f", "data": "e1"})


def test_versions_of_which_the_training_depends_must_be_the_same_on_all_hosts(monkeypatch):
    """NumPy draws the same order of images only in the same version."""
    plan, facts = Plan.read(ROOT / "ds_configs/digits.json", 1), []
    for version in ("2.4.6", "2.2.6"):
        monkeypatch.setattr("lbsgd.train.facts.installed", lambda package, version=version: f"{package} {version}")
        facts.append(fingerprints(plan, None, {}, ""))
    differ = {name for name in facts[0] if facts[0][name] != facts[1][name]}
    assert differ == {f"version of {name}" for name in ("torch", "torchvision", "deepspeed", "numpy", "triton")}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_host_whose_name_leads_to_itself_alone_is_refused_where_there_are_others(monkeypatch, rank):
    """Debian writes 127.0.1.1 into /etc/hosts."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    found = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (found[-1], 0))])
    hosts = two_peers()
    for address in ("10.0.0.7", "fe80::1%eth0"):
        found.append(address)
        hosts[rank].require_address()
    for address in ("127.0.1.1", "::1"):
        found.append(address)
        two_peers(hosts=("alpha", "alpha"))[rank].require_address()
        with pytest.raises(ConfigError, match=f"on {'alpha beta'.split()[rank]} takes {address} for its .*IFNAME"):
            hosts[rank].require_address()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    hosts[rank].require_address()


@pytest.fixture
def meeting_point(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))


def meet_in_threads(world_size, ranks, seconds):
    """Return what Peers.meet returns or raises for some ranks of a world."""

    def meet(rank):
        try:
            return Peers.meet(Processes(rank, world_size, 0, 1), seconds, lambda position: None)
        except LbsgdError as error:
            return error

    with ThreadPoolExecutor() as threads:
        return list(threads.map(meet, ranks))


def test_processes_that_do_not_come_are_named(meeting_point, monkeypatch):
    asked = []
    monkeypatch.setattr(peers_module, "allow_connections", asked.append)
    [error] = meet_in_threads(3, [0], seconds=0.5)
    assert asked == [3]
    assert isinstance(error, LostProcessError)
    assert "of 3 processes some did not come within 0.5 s: rank 1, 2; look at their hosts" in str(error)


def test_the_others_are_told_that_rank_0_may_not_open_a_file_for_each(meeting_point, monkeypatch):
    """They would wait for `--hang_timeout`."""
    few = ConfigError("rank 0 needs more open files")
    monkeypatch.setattr(peers_module, "allow_connections", Mock(side_effect=few))
    monkeypatch.setattr(peers_module, "WAITED_FOR_SECONDS", 2)
    refused, told = meet_in_threads(2, [0, 1], seconds=30)
    assert refused is few and isinstance(told, OtherFailed) and "rank 0 needs more open files" in str(told)


def test_a_meeting_point_that_nobody_serves_is_named(meeting_point):
    [error] = meet_in_threads(2, [1], seconds=1)
    assert isinstance(
        error, LostProcessError
    ) and f"cannot reach rank 0 at 127.0.0.1:{os.environ['MASTER_PORT']}" in str(error)


def test_a_run_that_torchrun_starts_again_hears_nothing_of_the_failure_before(meeting_point, monkeypatch):
    """Its agent keeps the store over restarts."""
    agent = TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    [gave_up] = meet_in_threads(2, [0], seconds=0.5)  # it tells those that wait
    assert isinstance(gave_up, LostProcessError)
    first, second = meet_in_threads(2, [0, 1], seconds=30)
    first.fail(DataError("no such file")), first.request_stop("SIGTERM")
    assert second.failure() and second.stop_requested() == "SIGTERM"
    for peers in meet_in_threads(2, [0, 1], seconds=30):
        assert peers.failure() is None and peers.stop_requested() is None
    assert agent.port


def test_the_reason_that_nccl_gives_last_is_told():
    text = (
        "NCCL error in: NCCLUtils.cpp:94, unhandled system error, NCCL version 2.28.9\nncclSystemError: a call to "
        "the system failed\nLast error:\nError while creating shared memory segment /dev/shm/nccl-a (size 9637888)"
    )
    said = str(first_cause_module.explained(RuntimeError(text), "iteration 0, pass 0", object()))
    assert said.startswith("lost another process at iteration 0, pass 0 (NCCL error in: NCCLUtils.cpp:94")
    assert said.endswith("Error while creating shared memory segment /dev/shm/nccl-a (size 9637888))")


OF_NCCL = (
    "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version "
    "2.28.9\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
)


@pytest.mark.parametrize(
    "text",
    [
        f"{OF_NCCL}Failed to CUDA calloc async 6291456 bytes",
        f"{OF_NCCL}Cuda failure 2 'out of memory'",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_a_gpu_whose_memory_a_library_finds_full_is_no_lost_process_and_no_bug(text):
    """torch's OutOfMemoryError is of its own allocator. Its libraries take memory beside it."""
    error = first_cause_module.explained(RuntimeError(text), "iteration 0", object())
    assert error.exit_code == 2 and str(error).startswith("the GPU's memory is full at iteration 0 (")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at gloo/transport/tcp/loop.cc:47] rv != -1. -1 vs -1. pipe: Too many open files"),
        OSError(24, "Too many open files", "train.beton"),
    ],
)
def test_a_limit_of_open_files_is_no_lost_process_and_no_bug(error):
    said = first_cause_module.explained(error, "the start", object())
    assert said.exit_code == 2 and "needs more at the start (" in str(said) and "(ulimit -n" in str(said)


@pytest.mark.parametrize(
    "text",
    [
        "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 5000ms for recv operation",
        "Gloo connectFullMesh failed with a timeout",
        "ProcessGroupWrapper: Monitored Barrier encountered error running collective",
        "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
        "connection reset by peer",
        "sendBytes failed on SocketImpl(fd=12): Broken pipe",
    ],
)
def test_whatever_words_a_library_has_for_a_lost_process_it_is_told_as_one(text):
    error = first_cause_module.explained(RuntimeError(text), "iteration 7", object())
    assert isinstance(error, LostProcessError) and str(error) == f"lost another process at iteration 7 ({text})"


def test_the_ways_out_of_full_memory_are_those_of_the_device_whose_memory_is_full():
    for full, whose, way in (
        (torch.OutOfMemoryError("CUDA out of memory"), "the GPU's", "--no-cuda_graphs"),
        (MemoryError("Unable to allocate 2.00 GiB"), "the host's", "--loader_threads"),
    ):
        said = str(first_cause_module.explained(full, "iteration 0", object()))
        assert said.startswith(f"{whose} memory is full at iteration 0 ({full}); ") and way in said


def test_the_time_in_which_the_first_cause_is_looked_for_is_enough_to_find_a_silent_process():
    needed = first_cause_module.TOLD_SECONDS + 3 * Peers.BEAT_SECONDS
    assert needed + 2 <= first_cause_module.FIRST_CAUSE_SECONDS  # 2 for the store to answer


def test_words_of_a_connection_tell_of_no_lost_process_where_nobody_else_is_or_no_call_failed(monkeypatch):
    """Each is a bug, even if the console for its traceback is gone."""
    console = io.StringIO()
    console.close()
    monkeypatch.setattr("sys.stderr", console)
    for error, peers in ((RuntimeError("Connection closed"), None), (ValueError("Connection closed"), object())):
        bug = first_cause_module.explained(error, "iteration 0", peers)
        print_error(bug)
        assert bug.exit_code == 1


def recipes_own():
    raise RuntimeError("lost the connection to the label server")


def of_compiled_code():
    torch.device("a connection")  # torch repeats the word


@pytest.mark.parametrize("fails, kind", [(recipes_own, LbsgdError), (of_compiled_code, LostProcessError)])
def test_a_recipe_s_own_error_is_a_bug_whatever_its_words(fails, kind):
    with pytest.raises(RuntimeError) as raised:
        fails()
    assert type(first_cause_module.explained(raised.value, "iteration 0", object())) is kind


def test_the_first_failure_counts_and_is_not_another_s_to_its_own_process():
    first, second = two_peers()
    assert second.failure() is None
    assert first.fail(TrainingError("no number")) is True
    assert second.fail(LostProcessError("lost another process")) is False
    failure = second.failure()
    assert isinstance(failure, OtherFailed) and failure.exit_code == TrainingError.exit_code == 3
    assert str(failure) == f"by rank 0 on {socket.gethostname()}: no number"
    assert first.failure() is None


def test_a_failure_of_several_lines_is_one_line_to_others():
    first, second = two_peers()
    first.fail(ConfigError("a.json: no lr", "b.json: no lr"))
    assert str(second.failure()) == f"by rank 0 on {socket.gethostname()}: a.json: no lr; b.json: no lr"


def test_what_a_process_tells_is_heard_before_it_is_called_silent(monkeypatch):
    first, second = two_peers()
    monkeypatch.setattr(second, "silent", lambda: ["rank 0 on alpha"])
    threading.Timer(0.1, first.fail, [TrainingError("no number")]).start()
    cause = first_cause_module.look_for_cause(second, "iteration 7")
    assert isinstance(cause, OtherFailed) and cause.exit_code == 3


def test_a_process_that_gives_no_sign_of_life_within_three_beats_is_named(monkeypatch):
    store, slept = HashStore(), []
    ranks = [Peers(Processes(rank, 3, 0, 1), store) for rank in range(3)]
    for rank, peers in enumerate(ranks):
        store.set(f"host/{rank}", f"host{rank}")
        peers.beat("iteration 7")

    def one_lives(seconds):
        slept.append(seconds)
        ranks[1].beat("iteration 7")  # at the same place: slow is not dead

    monkeypatch.setattr(peers_module, "time", SimpleNamespace(sleep=one_lives))
    assert ranks[0].silent() == ["rank 2 on host2"] and slept == [3 * Peers.BEAT_SECONDS]


def test_a_request_to_stop_reaches_the_others():
    first, second = two_peers()
    assert first.stop_requested() is None
    second.request_stop("SIGUSR1")
    assert first.stop_requested() == second.stop_requested() == "SIGUSR1"


# --- the guard: each test in a process of its own, which it ends -----------------------------------------------------


class Ending:
    """A process that ran function(*arguments): its exit code and its output."""

    def __init__(self, tmp_path, function, *arguments, signals=()):
        path = tmp_path / "console"
        self.process = forked(function, *arguments, output=path)
        try:
            if signals:
                while "ready" not in (path.read_text() if path.exists() else ""):
                    assert self.process.is_alive()
                    time.sleep(0.005)
            for number in signals:
                os.kill(self.process.pid, number)
            self.process.join(PATIENCE_SECONDS)
            self.code, self.text = self.process.exitcode, path.read_text()
            assert self.code is not None, f"still there after {PATIENCE_SECONDS} s\n{self.text}"
        finally:
            self.process.kill()
            self.process.join()

    @property
    def lines(self):
        return lines_that_end(self.text)


def wait_for_ever():
    """Wait as in a collective call whose other side is gone: in C++, where no signal reaches Python's handlers."""
    os.write(1, b"ready\n")  # at once: print writes the end of the line later, and an error may come in between
    HashStore().get("what nobody sets")


def guarded(nothing_to_save=True, peers=None, processes=ALONE, hang_timeout=60, then=wait_for_ever, launchers=()):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    with Guard(processes, hang_timeout, launchers) as guard:
        if peers:
            guard.follow(peers)
        guard.nothing_to_save = nothing_to_save
        guard.alive("iteration 7")
        then()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_at_once_a_process_that_has_nothing_to_save(tmp_path, number):
    ending = Ending(tmp_path, guarded, signals=[number])
    assert ending.code == Stopped.exit_code == 75
    assert ending.lines == [f"stopped: {number.name} at iteration 7; the same command with --resume goes on"]


def test_a_signal_that_asks_for_something_else_is_no_request_to_stop():
    """Python writes the number of every signal that has a handler into the pipe."""
    before = signal.signal(signal.SIGWINCH, lambda *_: None)
    signals = StopSignals()
    try:
        signal.raise_signal(signal.SIGWINCH)
        assert signals.wait(PATIENCE_SECONDS) == []
        signal.raise_signal(signal.SIGUSR1)
        assert signals.wait(PATIENCE_SECONDS) == [signal.SIGUSR1]
    finally:
        signals.restore()
        signal.signal(signal.SIGWINCH, before)
        signals.wake()
        signals.close()


def guarded_under_nohup():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    end_at_a_signal(" at the start")
    os.kill(os.getpid(), signal.SIGHUP)
    with Guard(ALONE, 60):
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(1.5)  # the guard looks twice a second


def test_under_nohup_a_closed_terminal_ends_nothing(tmp_path):
    ending = Ending(tmp_path, guarded_under_nohup)
    assert (ending.code, ending.lines) == (0, [])


def cannot_save():
    """A process that goes on with its passes and never saves."""
    guard_module.SAVE_SECONDS = 0.5
    with Guard(ALONE, 60) as guard:
        guard.nothing_to_save = False
        os.write(1, b"ready\n")
        while True:
            guard.alive("iteration 7")
            time.sleep(0.05)


def test_a_process_that_cannot_save_in_time_ends(tmp_path):
    ending = Ending(tmp_path, cannot_save, signals=[signal.SIGTERM])
    assert ending.code == 4
    assert ending.lines == ["error: asked to stop, but nothing could be saved within 0.5 s of iteration 7"]


def test_a_process_that_does_not_move_ends_and_one_that_moves_does_not(tmp_path):
    ending = Ending(tmp_path, guarded, True, None, ALONE, 1)
    assert ending.code == 4 and ending.lines == [
        "error: nothing has moved for 1 s since iteration 7; its device or a disk does not answer (--hang_timeout)"
    ]
    assert Ending(tmp_path, moves).code == 0


class Clock:
    """A clock that a test sets; looks: how often it was read."""

    now, looks = 0.0, 0

    def monotonic(self):
        self.looks += 1
        return self.now


def moves():
    """Runs for three times the timeout by the guard's clock, and never more than 0.9 of it at one place."""
    clock = guard_module.time = Clock()
    with Guard(ALONE, 1) as guard:
        for _ in range(4):
            clock.now += 0.9
            guard.alive("iteration 8")
            looks = clock.looks
            while clock.looks < looks + 1:
                time.sleep(0.01)


def is_stopped_for_a_day():
    """Is stopped, and the guard's thread runs again before the main thread gets to the end of its pass."""
    clock = guard_module.time = Clock()
    with Guard(ALONE, 600) as guard:
        guard.alive("iteration 8")
        for seconds in (0, 86_400):
            clock.now += seconds
            looks = clock.looks
            while clock.looks < looks + 6:  # it looks at most three times in a row
                time.sleep(0.01)


def test_a_process_that_was_stopped_by_ctrl_z_goes_on(tmp_path):
    assert Ending(tmp_path, is_stopped_for_a_day).code == 0


def moves_again(guard, asked):
    guard.hang_timeout = 1000
    guard.alive("iteration 8")
    asked.set()


def ends(guard, asked):
    asked.set()
    assert guard.closing.wait(PATIENCE_SECONDS)


@pytest.mark.parametrize("happens", [moves_again, ends])
def test_a_run_that_moves_again_or_ends_while_the_first_cause_is_looked_for_is_left_alone(monkeypatch, happens):
    ended, asked, guard = [], threading.Event(), Guard(ALONE, 0.2)
    monkeypatch.setattr(guard, "first_cause", lambda: happens(guard, asked))
    monkeypatch.setattr(guard, "end", ended.append)
    with guard:
        assert asked.wait(PATIENCE_SECONDS)
    assert ended == []


def test_a_failure_that_is_heard_of_once_the_run_has_ended_changes_nothing(monkeypatch):
    """Another process may fail while it writes its last files."""

    def failure():
        guard.closing.set()
        return OtherFailed(1, "beta", "no number", 3)

    ended, guard = [], Guard(ALONE, 60)
    peers = SimpleNamespace(BEAT_SECONDS=0, beat=lambda position: None, stop_requested=lambda: None, failure=failure)
    monkeypatch.setattr(guard, "end", ended.append)
    guard.follow_peers(peers)
    assert ended == []


def launcher_dies(reaped):
    launcher = subprocess.Popen(["sleep", "1000"])
    watched = psutil.Process(launcher.pid)

    def then():
        launcher.kill()
        if reaped:
            launcher.wait()
        wait_for_ever()

    guarded(then=then, launchers=[watched])


@pytest.mark.parametrize("reaped", [True, False])
def test_a_process_whose_launcher_is_gone_ends_also_where_nobody_asks_for_the_launcher_s_exit_code(tmp_path, reaped):
    ending = Ending(tmp_path, launcher_dies, reaped)
    assert ending.code == 75 and "is gone at iteration 7; the same command with --resume goes on" in ending.lines[0]


def launcher_dies_and_a_signal_says_so():
    """As when the kernel, or DeepSpeed's launcher, sends SIGTERM to the processes of a launcher that has died."""
    launcher = subprocess.Popen(["sleep", "1000"])
    watched = psutil.Process(launcher.pid)

    def then():
        launcher.kill()
        launcher.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for_ever()

    guarded(then=then, launchers=[watched])


def test_a_sigterm_that_comes_with_the_launcher_s_death_is_told_as_that(tmp_path):
    ending = Ending(tmp_path, launcher_dies_and_a_signal_says_so)
    assert ending.code == 75 and len(ending.lines) == 1
    assert ending.lines[0].startswith("stopped: its launcher (process ")


def raises(error):
    def now():
        raise error

    guarded(then=now)


@pytest.mark.parametrize(
    "error, code, traceback",
    [
        (DataError("no such file"), 2, False),
        (ZeroDivisionError("division by zero"), 1, True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), 2, False),
        (Stopped("SIGTERM"), 75, False),
        (SystemExit("a recipe's own end, of which the others do not know"), 1, True),
    ],
)
def test_an_error_ends_with_its_code_and_a_bug_with_its_traceback(tmp_path, error, code, traceback):
    ending = Ending(tmp_path, raises, error)
    assert ending.code == code and len(ending.lines) == 1 and str(error) in ending.lines[0]
    assert ("Traceback" in ending.text) == traceback


def raises_a_bug(is_first):
    Peers.BEAT_SECONDS = 60
    first, second = two_peers()
    if not is_first:
        first.fail(TrainingError("name 'logist' is not defined"))

    def bug():
        raise NameError("name 'logist' is not defined")

    guarded(peers=second, processes=Processes(1, 2, 1, 2), then=bug)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_bug_that_ends_all_processes_at_once_prints_one_traceback(tmp_path, is_first):
    """Hundreds of processes come to the same line of a recipe together."""
    ending = Ending(tmp_path, raises_a_bug, is_first)
    assert ending.code == 1 and len(ending.lines) == is_first == ("Traceback" in ending.text)


@pytest.mark.parametrize("console", ["> /dev/full 2>&1", ">&- 2>&-"])
def test_a_console_that_is_gone_keeps_no_process_from_ending(console):
    """Even if nothing can be written, a process ends with its error's code."""
    code = "from lbsgd.processes.ending import *; print('a'); end_with_error(LbsgdError('b'))"
    command = f"{shlex.join([sys.executable, '-c', code])} {console}"
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    assert subprocess.run(command, shell=True, env=buffered, timeout=60).returncode == 2


# A full pipe without a reader: the main thread blocks in a write, and another thread ends the process.
FULL_PIPE = """
import threading, time
from lbsgd.processes import ending
ending.CONSOLE_SECONDS = 0.5

def end():
    time.sleep(0.5)
    ending.end_with_error(ending.Stopped("SIGTERM"))

threading.Thread(target=end).start()
while True:
    print("x" * 10_000, flush=True)
"""


def test_a_console_that_takes_no_more_keeps_no_process_from_ending():
    command, buffered = [sys.executable, "-c", FULL_PIPE], {**os.environ, "PYTHONUNBUFFERED": ""}
    with subprocess.Popen(command, cwd=ROOT, env=buffered, stdout=subprocess.PIPE) as process:
        try:
            assert process.wait(30) == 75
        finally:
            process.kill()


# A stream during whose write the signal comes.
SIGNALLED = """
import io, os, signal, sys
from lbsgd.processes.ending import end_at_a_signal

class Signalled(io.FileIO):
    def write(self, data):
        written = super().write(data)
        os.kill(os.getpid(), signal.SIGTERM)
        return written

end_at_a_signal(" at the start")
sys.{stream} = io.TextIOWrapper(io.BufferedWriter(Signalled(sys.{stream}.fileno(), "w")))
print("the plan", file=sys.{stream}, flush=True)
"""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_signal_that_comes_while_a_line_is_written_ends_a_process_as_any_other(stream):
    """Python refuses a signal handler's write to a stream while another write is going on."""
    code = SIGNALLED.format(stream=stream)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 75
    assert done.stdout + done.stderr == "the plan\nstopped: SIGTERM at the start\n"


@pytest.mark.parametrize("saved, words", [(True, "the run was saved"), (False, "nothing was saved")])
def test_a_second_signal_says_whether_the_run_was_saved(monkeypatch, saved, words):
    """Another process's signal does not count as this one's first, because hosts may be stopped by hand one by one."""
    said, clock = [], Clock()
    monkeypatch.setattr(guard_module, "time", clock)
    monkeypatch.setattr(guard_module, "end_with_error", lambda error, quiet: said.append((str(error), quiet)))
    guard = Guard(Processes(1, 2, 1, 2), 60)
    guard.request_stop("another process was told to")
    guard.saved = saved
    for clock.now in (5, 5.9):
        guard.signalled(signal.SIGTERM)
    assert said == []
    clock.now = 6.1
    guard.signalled(signal.SIGTERM)
    assert said == [(f"by a second signal, SIGTERM; {words}", saved)]


def meets(rank, address, port, seconds):
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    processes = Processes(rank, 2, rank, 1)
    with Guard(processes, seconds) as guard:
        Peers.meet(processes, seconds, guard.alive)


UNKNOWN = "error: MASTER_ADDR is 'no-host.invalid', and this host does not know it"


@pytest.mark.parametrize(
    "rank, address, code, told",
    [
        (0, "no-host.invalid", 2, UNKNOWN),
        (1, "no-host.invalid", 2, UNKNOWN),
        (0, "a..b", 2, "error: MASTER_ADDR is 'a..b', and this host does not know it"),
        (1, "192.0.2.1", 4, "error: cannot reach rank 0 at 192.0.2.1:{} within 9 s ("),
        (
            1,
            "127.0.0.1",
            4,
            "error: cannot reach rank 0 at 127.0.0.1:{} within 9 s ([Errno 111] Connection refused); on ",
        ),
        (0, "192.0.2.1", 2, f"error: rank 0 runs on {socket.gethostname()}, and 192.0.2.1:{{}} does not lead there ("),
    ],
)
def test_a_meeting_point_that_cannot_be_reached_is_told_before_the_guard_sees_a_hang(
    tmp_path, rank, address, code, told
):
    port = free_port()
    ending = Ending(tmp_path, meets, rank, address, port, 9)  # each attempt may take 6, and waits for a busy machine
    [line] = ending.lines
    assert (ending.code, line[: len(told.format(port))]) == (code, told.format(port))
    assert "frame #" not in ending.text  # torch's own client prints its stack for each attempt


def test_a_port_at_which_something_else_listens_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        ending = Ending(tmp_path, meets, 1, "127.0.0.1", port := other.getsockname()[1], 3)
    [line] = ending.lines
    assert ending.code == 4
    assert line.startswith(
        f"error: nothing has moved for 3 s since the connection to 127.0.0.1:{port}; another process"
    )


GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234"


def loses(how, local_rank=0, host="beta"):
    """Rank 0 of two, whose collective call fails or never returns, after rank 1 has died or reported its failure."""
    Peers.BEAT_SECONDS, guard_module.LAST_WORDS_SECONDS = 0.05, 0.1
    socket.gethostname = lambda: "alpha"
    first, second = two_peers(hosts=("alpha", host))
    second.beat("iteration 7")

    def fails():
        if how == "other failed":
            socket.gethostname = lambda: host
            second.fail(TrainingError("the loss is not a number"))
            socket.gethostname = lambda: "alpha"
        if how == "hangs":
            wait_for_ever()
        (_ for _ in ()).throw(RuntimeError(GLOO))  # without a `raise` statement, as compiled code

    guarded(peers=first, processes=Processes(0, 2, local_rank, 1), hang_timeout=1, then=fails)


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_the_other_process_that_died_is_named_whether_the_collective_call_fails_or_hangs(tmp_path, how):
    ending = Ending(tmp_path, loses, how)
    assert ending.code == 4 and ending.lines == [
        "error: rank 1 on beta died or has not answered since iteration 7; --resume goes on from the newest checkpoint"
    ]
    assert "Traceback" not in ending.text


@pytest.mark.parametrize(
    "local_rank, host, lines",
    [(0, "beta", ["ended: by rank 1 on beta: the loss is not a number"]), (1, "beta", []), (0, "alpha", [])],
)
def test_the_first_cause_is_told_once_on_every_host_and_its_code_is_everybody_s(tmp_path, local_rank, host, lines):
    ending = Ending(tmp_path, loses, "other failed", local_rank, host)
    assert (ending.code, ending.lines) == (TrainingError.exit_code, lines)


def serves_the_store(port):
    Peers.BEAT_SECONDS = 0.05
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    processes = Processes(0, 3, 0, 1)
    guarded(peers=Peers(processes, store), processes=processes)


def test_rank_0_that_ends_because_of_another_lets_a_third_read_why(tmp_path):
    """Its store ends with it, and each process looks only once a second."""
    port = free_port()
    process = forked(serves_the_store, port, output=tmp_path / "console")
    try:
        second, third = (Peers(Processes(rank, 3, 0, 1), TCPStore("127.0.0.1", port)) for rank in (1, 2))
        second.fail(TrainingError("the loss is not a number"))
        time.sleep(1)
        assert third.failure().exit_code == TrainingError.exit_code
        process.join(PATIENCE_SECONDS)
        assert process.exitcode == TrainingError.exit_code
    finally:
        process.kill()


def fails_and_ends_after_a_signal():
    with Guard(Processes(0, 2, 0, 1), 60) as guard:

        def signalled(seconds):
            guard.thread.join()  # from now on nothing reads signals
            print("ready")
            select.select([guard.signals.reader], [], [], PATIENCE_SECONDS)

        guard_module.time = SimpleNamespace(monotonic=time.monotonic, sleep=signalled)  # while rank 0's words are read
        guard.follow(two_peers()[0])
        raise DataError("no such file")


def test_a_signal_to_a_process_that_is_ending_changes_nothing(tmp_path):
    """A launcher sends SIGTERM to the others as soon as one has ended."""
    ending = Ending(tmp_path, fails_and_ends_after_a_signal, signals=[signal.SIGTERM])
    assert (ending.code, ending.text) == (2, "ready\nerror: no such file\n")


class Stuck:
    """A store that stops answering, as if its host had stopped, or that fails once."""

    def __init__(self, store, fails_once=False):
        self.store, self.fails_once, self.stuck = store, fails_once, threading.Event()

    def __getattr__(self, name):
        if self.stuck.is_set() and self.fails_once:
            self.stuck.clear()
            raise RuntimeError("the store timed out")
        if self.stuck.is_set():
            time.sleep(1000)
        return getattr(self.store, name)


def store_breaks(fails_once):
    Peers.BEAT_SECONDS = 0.05
    guard_module.LAST_WORDS_SECONDS = first_cause_module.FIRST_CAUSE_SECONDS = 0.2
    first, second = two_peers(store := Stuck(HashStore(), fails_once))

    def then():
        threading.Thread(
            target=lambda: [second.beat("iteration 7") or time.sleep(0.02) for _ in iter(int, 1)], daemon=True
        ).start()
        store.stuck.set()
        wait_for_ever()

    guarded(peers=first, processes=Processes(0, 2, 0, 1), hang_timeout=1, then=then)


@pytest.mark.parametrize("fails_once", [False, True])
def test_a_store_that_hangs_or_fails_once_keeps_nobody_from_ending(tmp_path, fails_once):
    ending = Ending(tmp_path, store_breaks, fails_once)
    assert ending.code == 4 and len(ending.lines) == 1, ending.text


def store_is_gone_at_a_stop():
    Peers.BEAT_SECONDS, guard_module.LAST_WORDS_SECONDS = 1000, 0.05
    first, _ = two_peers(store := Stuck(HashStore(), fails_once=True))

    def then():
        store.stuck.set()
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for_ever()

    guarded(peers=first, processes=Processes(0, 2, 0, 1), then=then)


def test_a_stop_is_one_line_also_where_the_store_is_gone(tmp_path):
    ending = Ending(tmp_path, store_is_gone_at_a_stop)
    told = "stopped: SIGTERM at iteration 7; the same command with --resume goes on"
    assert (ending.code, ending.lines) == (75, [told]) and "Traceback" not in ending.text


class Gone:
    """A store whose process has ended."""

    def __getattr__(self, name):
        raise RuntimeError("Connection reset by peer")


def leaves_after_rank_0(error):
    Peers.BEAT_SECONDS = 0.01
    with Guard(Processes(1, 2, 1, 2), 60) as guard:
        guard.follow(Peers(Processes(1, 2, 1, 2), Gone()))
        time.sleep(0.3)
        if error:
            raise error
    print("left")


@pytest.mark.parametrize(
    "error, code, text", [(None, 0, "left\n"), (DataError("no such file"), 2, "error: no such file\n")]
)
def test_a_process_whose_store_has_ended_first_still_ends_as_it_should(tmp_path, error, code, text):
    """At the end of a run the store ends with rank 0. If this process then fails, it prints its own error."""
    ending = Ending(tmp_path, leaves_after_rank_0, error)
    assert (ending.code, ending.text) == (code, text)


def test_a_meeting_whose_store_ends_is_a_lost_process(monkeypatch):
    monkeypatch.setattr(peers_module, "meeting_point", lambda *_: Gone())
    with pytest.raises(LostProcessError, match="rank 0, or the way to its host, is gone .Connection reset by peer"):
        Peers.meet(Processes(1, 2, 0, 1), 60, lambda position: None)


def leaves_while_the_store_answers(seconds):
    Peers.BEAT_SECONDS, asked = 0.01, threading.Event()
    guard_module.LAST_WORDS_SECONDS = min(seconds, 0.5)
    store = SimpleNamespace(set=lambda *_: (asked.set(), time.sleep(seconds / 2)), check=lambda _: False)
    with Guard(ALONE, 60) as guard:
        guard.follow(Peers(Processes(0, 2, 0, 1), store))
        asked.wait()
    print("waiting" if guard.peers_thread.is_alive() else "ended")


@pytest.mark.parametrize("seconds, text", [(0.5, "ended\n"), (2000, "waiting\n")])
def test_a_run_that_ends_waits_for_the_store_s_answer_but_not_for_ever(tmp_path, seconds, text):
    ending = Ending(tmp_path, leaves_while_the_store_answers, seconds)
    assert (ending.code, ending.text) == (0, text)


def test_only_the_first_of_two_threads_that_end_a_process_says_why(monkeypatch):
    said = []
    monkeypatch.setattr(guard_module, "end_with_error", lambda error, quiet: said.append(str(error)))
    guard = Guard(ALONE, 60)
    guard.end(DataError("the cause"))
    second = threading.Thread(target=guard.end, args=[LostProcessError("its consequence")], daemon=True)
    second.start()
    second.join(0.2)
    assert said == ["the cause"]


def told_by_another(reason):
    Peers.BEAT_SECONDS = guard_module.LAST_WORDS_SECONDS = 0.05
    first, second = two_peers()
    guarded(peers=first, processes=Processes(0, 2, 0, 1), then=lambda: (second.request_stop(reason), wait_for_ever()))


def test_what_one_process_was_told_stops_the_others(tmp_path):
    ending = Ending(tmp_path, told_by_another, "SIGUSR1")
    assert ending.code == 75 and ending.lines == [
        "stopped: SIGUSR1 at iteration 7; the same command with --resume goes on"
    ]


def test_a_process_tells_the_others_what_it_was_told_first_and_its_time_to_save_is_from_then_on(monkeypatch):
    monkeypatch.setattr(Peers, "BEAT_SECONDS", 0.01)
    first, second = two_peers()
    guard = Guard(ALONE, 60)
    guard.request_stop("SIGTERM")
    began = guard.stop_began
    guard.follow(first)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not second.stop_requested():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    guard.request_stop("SIGUSR1")
    guard.closing.set(), guard.peers_thread.join()
    assert guard.stop_requested == second.stop_requested() == "SIGTERM" and guard.stop_began == began


def has_nothing_to_save(port):
    Peers.BEAT_SECONDS = 1000  # so that only its last words are seen
    processes = Processes(1, 2, 0, 1)
    guarded(peers=Peers(processes, TCPStore("127.0.0.1", port)), processes=processes)


def test_a_process_that_ends_with_nothing_to_save_stops_the_others(tmp_path):
    """They would wait for it, and then take it for dead."""
    store = TCPStore("127.0.0.1", port := free_port(), is_master=True, wait_for_workers=False)
    ending = Ending(tmp_path, has_nothing_to_save, port, signals=[signal.SIGTERM])
    assert (ending.code, ending.lines) == (75, [])  # rank 0 prints it
    assert Peers(Processes(0, 2, 0, 1), store).stop_requested() == "SIGTERM"


def waits_for_a_third(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank))
    processes = Processes(rank, 3, rank, 3)
    with Guard(processes, 60) as guard:
        Peers.meet(processes, 60, lambda position: (guard.alive(position), os.write(1, b"ready\n")))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_told_to_stop_before_all_have_met_stops_those_that_wait(tmp_path, rank):
    """They would wait for it until --hang_timeout, and then take it for lost."""
    port, path = free_port(), tmp_path / "other"
    other = forked(waits_for_a_third, 1 - rank, port, output=path)
    try:
        ending = Ending(tmp_path, waits_for_a_third, rank, port, signals=[signal.SIGTERM])
        other.join(10)
        assert (ending.code, other.exitcode) == (75, 75)
    finally:
        other.kill()
    told = ["stopped: SIGTERM at the meeting of all processes; the same command with --resume goes on"]
    assert (ending.lines, lines_that_end(path.read_text())) == ((told, []) if rank == 0 else ([], told))


def leaves():
    before = threading.active_count()
    with Guard(ALONE, 60):
        pass
    deadline = time.monotonic() + PATIENCE_SECONDS
    while threading.active_count() > before:
        assert time.monotonic() < deadline
    print("left")


def test_a_run_that_ends_well_leaves_no_thread_and_prints_nothing(tmp_path):
    ending = Ending(tmp_path, leaves)
    assert (ending.code, ending.text) == (0, "left\n")


def ours(*_):
    print("our own handler")


def signals_after_leaving():
    signal.signal(signal.SIGUSR1, ours)
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    open_before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        with Guard(ALONE, 60):
            assert signal.getsignal(signal.SIGUSR1) is not ours
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert len(os.listdir("/proc/self/fd")) == open_before
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)


def test_after_the_run_signals_mean_what_they_did_before(tmp_path):
    ending = Ending(tmp_path, signals_after_leaving)
    assert (ending.code, ending.text) == (-signal.SIGTERM, "our own handler\n")


@pytest.mark.parametrize(
    "name, world_size, code", [("lbsgd peers", 1, 0), ("somebody else's", 1, 9), ("somebody else's", 2, 0)]
)
def test_a_thread_that_still_waits_makes_no_finished_run_fail(name, world_size, code):
    """In torch's C++ code it would abort the process with exit code -6; seen on a busy machine."""
    script = (
        "import atexit, sys, threading, time\n"
        "from lbsgd.processes.ending import end_despite_threads\n"
        "from lbsgd.processes.environment import Processes\n"
        "atexit.register(print, 'atexit')\n"
        "threading.Thread(target=lambda: time.sleep(0.3) or print('no daemon')).start()\n"
        f"threading.Thread(target=time.sleep, args=(60,), name={name!r}, daemon=True).start()\n"
        "print('all is written')\n"
        f"end_despite_threads(Processes(0, {world_size}, 0, {world_size}))\n"
        "sys.exit(9)"
    )
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    done = subprocess.run([sys.executable, "-c", script], env=buffered, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "all is written\nno daemon\natexit\n")


def test_the_guard_looks_once_before_it_waits():
    """A small run has made ten iterations half a second later, though its launcher was gone before it began."""
    order, closing = [], threading.Event()
    guard = Mock(closing=closing, hang_timeout=60, moved=time.monotonic(), stop_requested=None)
    guard.lost_launcher.side_effect = lambda: order.append("looks") or "its launcher is gone"
    guard.signals.wait.side_effect = lambda seconds: order.append("waits") or closing.set() or []
    Guard.watch(guard)
    assert order == ["looks", "waits"] and guard.request_stop.call_args.args == ("its launcher is gone",)
