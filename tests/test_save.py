"""Saving, write by write: after kills, full disks and flipped bits a complete checkpoint remains, and is found."""

import ctypes
import errno
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import sys
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import aggregating
import pytest
import torch
from oracle import network
from processes import in_processes
from small_engine import recipe, train
from test_checkpoint import complete, saved
from trainers import trainer

import lbsgd
from lbsgd.commands.flag_types import interval
from lbsgd.config.precision import set_precision
from lbsgd.disk import replace_file
from lbsgd.errors import CheckpointError, DivergedError
from lbsgd.report.run_log import RunLog, read_run
from lbsgd.train import checkpoint
from lbsgd.train.aggregation.resume import saved_choice
from lbsgd.train.engine_state import EngineState, gather_state, restore_state
from lbsgd.train.reporter import Reporter
from lbsgd.train.run import Every
from lbsgd.train.saver import Reached, Saver

FILES = ("weights.safetensors", "momentum.safetensors", "random.safetensors", "state.json", "manifest.json")
UNSUPPORTED = 77
HEADER = {
    **{"model": "resnet8", "precision": "fp32", "schedule": {}, "config": {}, "recipe": {"epochs": 2}},
    **{"global_batch": 128, "num_workers": 4, "iterations_per_epoch": 1},
}


def in_child(function, *arguments):
    """Return the exit code of a forked process that runs a function. Its exceptions are printed."""
    child = os.fork()
    if child == 0:
        try:
            function(*arguments)
            os._exit(0)
        except BaseException:  # noqa: BLE001  a child process that ends without a word would hang its parent
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def value(path):
    """Return the value that `saved` wrote into a checkpoint."""
    return checkpoint.load(path)[0]["weights"]["w"][0, 0].item()


def values(folder):
    return {path.name[:18]: value(path) for path in complete(folder)}


# --- killed between any two writes
# --------------------------------------------------------------------------------------


def copy_before_each_change(folder, copies):
    """Copy the folder before each change that this process makes to the file system. A file is written in two halves.

    A kill at that moment would leave what the copy holds.
    """
    number, copying = itertools.count(), threading.local()

    def change(event, arguments):
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "half a file") and not vars(copying):
            copying.now = True
            shutil.copytree(folder, copies / f"{next(number):03}")
            del copying.now

    def in_halves(path, data):
        with open(path, "wb", buffering=0) as file:
            file.write(data[: len(data) // 2])
            change("half a file", ())
            return len(data) // 2 + file.write(data[len(data) // 2 :])

    Path.write_bytes = in_halves
    sys.addaudithook(change)


def killed_at_every_point(template, folder, function):
    """Let the folder be a copy of `template` after function(folder) was killed at each point, and after it was not."""
    copies = folder.with_name("copies")
    shutil.copytree(template, folder)
    assert in_child(lambda: (copy_before_each_change(folder, copies), function(folder))) == 0
    folder.rename(copies / "whole")
    places = sorted(copies.iterdir())
    assert len(places) > 3
    for place in places:
        place.rename(folder)
        yield place.name == "whole"
        shutil.rmtree(folder)


@pytest.mark.parametrize("before", [[], [1], [1, 2, 3], [5], [3, 4, 5], [3, 4, 5, 5]])
def test_a_save_killed_anywhere_leaves_the_checkpoint_before_it_or_the_new_one(tmp_path, before):
    """Save first, then again, then so that the oldest is deleted, then the same iteration, replacing a checkpoint."""
    template, folder = tmp_path / "template", tmp_path / "checkpoints"
    template.mkdir()
    for iteration in before:
        saved(template, iteration, value=1.0)
    old, new = {f"iteration_{iteration:08}": 1.0 for iteration in before}, {"iteration_00000005": 2.0}
    points = 0
    for done in killed_at_every_point(template, folder, lambda folder: saved(folder, 5, value=2.0)):
        points += 1
        found = values(folder)
        assert checkpoint.named(folder) == complete(folder)  # a checkpoint that has its name had all files first
        newest = dict([*found.items()][-1:])
        assert newest == new or newest == dict([*old.items()][-1:]) and not done
        assert found.items() <= old.items() | new.items() and len(found) >= min(3, len(before))
        saved(folder, 6, value=3.0)  # removes what was left behind
        assert value(checkpoint.newest(folder)) == 3.0
        assert sorted(path.name[:18] for path in folder.iterdir()) == sorted(values(folder))[-3:]
    assert points > 15


def test_the_last_save_of_an_iteration_counts_however_often_it_was_saved(tmp_path):
    for number in range(12):
        saved(tmp_path, 5, value=float(number))
        assert value(checkpoint.newest(tmp_path)) == number and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "write",
    [
        lambda path, value: checkpoint.export_weights(path, {"w": torch.full((100, 100), value)}),
        lambda path, value: replace_file(path, json.dumps([value] * 1000).encode()),
    ],
)
def test_a_file_replaced_by_a_process_that_is_killed_anywhere_is_the_old_or_the_new_one(tmp_path, write):
    template, path = tmp_path / "template", tmp_path / "folder/file"
    template.mkdir()
    write(template / "file", 1.0)
    old = (template / "file").read_bytes()
    write(template / "file", 2.0)
    new = (template / "file").read_bytes()
    (template / "file").write_bytes(old)
    for done in killed_at_every_point(template, path.parent, lambda folder: write(folder / "file", 2.0)):
        assert path.read_bytes() in ((new,) if done else (old, new))
        write(path, 2.0)  # another process, which removes what was left behind
        assert os.listdir(path.parent) == ["file"]


def test_all_is_forced_to_the_disk_before_a_checkpoint_gets_its_name(tmp_path, monkeypatch):
    """After a power failure there is then a complete checkpoint, too. The new name itself is forced there last."""
    events = []

    def noting(name, function):
        monkeypatch.setattr(
            os, name, lambda *paths, **options: (events.append((name, where(paths[0]))), function(*paths, **options))[1]
        )

    def where(path):
        return Path(os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else path).name

    noting("fsync", os.fsync), noting("rename", os.rename)
    building = f".iteration_00000001.{os.getpid()}"
    saved(tmp_path, 1)
    assert events == [
        *(("fsync", name) for name in FILES),
        ("fsync", building),
        ("rename", building),
        ("fsync", tmp_path.name),
    ]


# --- a full disk
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_save_that_a_limit_on_file_sizes_ends_leaves_the_one_before_and_the_next_succeeds(tmp_path, name):
    """The kernel stops the write of a file in the middle."""

    def limited():
        size = (saved(tmp_path, 1) / name).stat().st_size
        if any(
            (tmp_path / "iteration_00000001" / other).stat().st_size >= size for other in FILES[: FILES.index(name)]
        ):
            shrink_others(name)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, -1))
        with pytest.raises(OSError) as caught:
            saved(tmp_path, 2)
        assert caught.value.errno == errno.EFBIG
        assert [path.name for path in tmp_path.iterdir()] == ["iteration_00000001"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        saved(tmp_path, 3)
        assert list(values(tmp_path)) == ["iteration_00000001", "iteration_00000003"]

    assert in_child(limited) == 0


def shrink_others(name):
    """Apply the limit to one file only: the earlier, larger ones are written without it."""
    write = checkpoint.write

    def unlimited(path, data):
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        if path.name != name:
            resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        try:
            return write(path, data)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    checkpoint.write = unlimited


def mount_small_disk(folder, size):
    """Mount a small file system that only this process sees. End the process if that is forbidden."""
    CLONE_NEWNS, CLONE_NEWUSER, MS_REC, MS_PRIVATE = 0x20000, 0x10000000, 0x4000, 0x40000
    libc = ctypes.CDLL(None, use_errno=True)
    if (
        libc.unshare(CLONE_NEWNS | (CLONE_NEWUSER if os.geteuid() else 0))
        or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)
        or libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode())
    ):
        os._exit(UNSUPPORTED)


def test_a_full_disk_loses_nothing_and_once_there_is_room_the_next_save_succeeds(tmp_path):
    """From no free page to just too few: the disk is full at one file after another."""

    def full():
        mount_small_disk(tmp_path, size=200 * 1024)
        ballast, page = tmp_path / "ballast", 4096
        saved(tmp_path / "checkpoints", 1)
        for free in itertools.count():
            with ballast.open("wb", buffering=0) as file:
                try:
                    while file.write(bytes(page)) == page:
                        pass
                except OSError:
                    file.truncate(file.tell() // page * page - free * page)
            try:
                saved(tmp_path / "checkpoints", 2, value=2.0)
                break
            except OSError as error:
                assert error.errno == errno.ENOSPC
            assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["iteration_00000001"]
            assert values(tmp_path / "checkpoints") == {"iteration_00000001": 1.0}
        assert free > 5 and values(tmp_path / "checkpoints") == {"iteration_00000001": 1.0, "iteration_00000002": 2.0}

    code = in_child(full)
    if code == UNSUPPORTED:
        pytest.skip("no file system may be mounted here, not even in a namespace of our own")
    assert code == 0


def test_what_cannot_be_deleted_stops_no_save(tmp_path, monkeypatch):
    (tmp_path / ".iteration_00000001.99").mkdir()

    def busy(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(16, "Device or resource busy")  # NFS's answer for a folder with a file that is still open

    monkeypatch.setattr(shutil, "rmtree", busy)
    for iteration in range(1, 6):
        checkpoint.save(tmp_path, iteration, {}, {})
    assert [path.name for path in complete(tmp_path)] == [f"iteration_0000000{at}" for at in (3, 4, 5)]


def test_a_log_that_cannot_be_written_is_told_and_the_next_line_brings_both(tmp_path):
    """The kernel stops the write of a line in the middle."""

    def limited():
        said, log = [], RunLog(tmp_path, HEADER)
        progress = SimpleNamespace(say=said.append, iteration=lambda record: None)
        reporter = Reporter(log, progress, SimpleNamespace(monitor=SimpleNamespace(enabled=False), device="cpu"))
        record = {"num_iterations": 1, "epoch": 0.0, "lr": 0.1, "train_loss": 1.0, "images_per_second": 1.0}
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 20, -1))
        reporter.report("iteration", {"iteration": 0, **record, "data_wait_pct": 0.0})
        [line] = said
        assert "log.jsonl could not be written ([Errno 27] File too large); training goes on" in line
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        reporter.report("iteration", {"iteration": 1, **record, "data_wait_pct": 0.0})
        log.close()
        assert [each["iteration"] for each in read_run(tmp_path).iterations] == [0, 1]

    assert in_child(limited) == 0


def test_a_save_that_failed_for_another_reason_than_the_disk_is_not_kept_quiet(tmp_path, monkeypatch):
    ours = trainer(tmp_path)

    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(checkpoint, "save", broken)
    ours.save()
    with pytest.raises(ZeroDivisionError):
        ours.save()


# --- damage -----------------------------------------------------------------------------------------------------------


DAMAGE = {
    "cut": lambda data: data[:-1],
    "emptied": lambda data: b"",
    "overwritten": lambda data: bytes(len(data)),
    "flipped": lambda data: data[:20] + bytes([data[20] ^ 4]) + data[21:],
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_and_the_next_older_whole_checkpoint_is_used(tmp_path, name, damage):
    for iteration in (1, 2, 3):
        saved(tmp_path, iteration, value=float(iteration))
    for iteration in (2, 3):
        path = tmp_path / f"iteration_0000000{iteration}" / name
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    said = []
    tensors, state, _ = checkpoint.load_newest(tmp_path, {"seed": 0}, said.append)
    assert tensors["weights"]["w"][0, 0] == 1 and state["counters"] == {"iteration": 1}
    first, second, last = said
    for line, iteration in ((first, 3), (second, 2)):
        assert line.startswith("warning: ") and f"iteration_0000000{iteration}" in line
        assert name in line or name == "manifest.json"  # a manifest that cannot be read, or that names another file
    assert last == f"resuming from {tmp_path / 'iteration_00000001'}"


def test_any_damage_to_the_manifest_is_found(tmp_path):
    """Only the manifest has no checksum. Flip one bit of each of its bytes, and cut it at each length."""
    path, bit = saved(tmp_path, 1) / "manifest.json", random.Random(0)
    data = path.read_bytes()
    for at in range(len(data)):
        for damaged in (data[:at], data[:at] + bytes([data[at] ^ 1 << bit.randrange(8)]) + data[at + 1 :]):
            path.write_bytes(damaged)
            with pytest.raises(checkpoint.DamagedError):
                checkpoint.load(path.parent)


def test_with_no_whole_checkpoint_left_all_are_named(tmp_path):
    for iteration in (1, 2):
        (saved(tmp_path, iteration) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_newest(tmp_path, {"seed": 0}, print)
    assert all(f"iteration_0000000{iteration}/state.json" in str(caught.value) for iteration in (1, 2))
    assert f"no whole checkpoint is left in {tmp_path}" in str(caught.value)


class Bomb:
    def __reduce__(self):
        return os._exit, (66,)


def test_loading_a_checkpoint_or_an_export_unpickles_no_object(tmp_path):
    """Python reports each class or function that unpickling looks up. weights-only torch.load has its own unpickler."""
    path = saved(tmp_path, 1)
    checkpoint.export_weights(tmp_path / "weights.pt", {"w": torch.ones(2)})

    def load():
        sys.addaudithook(lambda event, _: os._exit(66) if event == "pickle.find_class" else None)
        checkpoint.load(path)
        assert torch.load(tmp_path / "weights.pt", weights_only=True)["w"].sum() == 2

    def load_a_bomb():
        for name in FILES[:3]:
            (path / name).write_bytes(pickle.dumps(Bomb()))
            manifest = {other: checkpoint.manifest_entry((path / other).read_bytes()) for other in FILES[:4]}
            (path / "manifest.json").write_text(json.dumps(manifest))
            with pytest.raises(checkpoint.DamagedError):
                checkpoint.load(path)

    assert in_child(lambda: pickle.loads(pickle.dumps(Bomb()))) == 66
    assert in_child(load) == 0 and in_child(load_a_bomb) == 0


# --- when, and what
# -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, meant", [("50", (50, None)), ("1", (1, None)), ("10m", (None, 10)), ("0.5m", (None, 0.5))]
)
def test_an_interval_is_of_iterations_or_minutes(text, meant):
    assert interval(text) == meant


@pytest.mark.parametrize("text", ["0", "-5", "1.5", "0m", "-1m", "m", "", "10h", "10 minutes", "nanm", "infm"])
def test_what_is_no_interval_is_refused(text):
    with pytest.raises(Exception, match="neither a number of iterations, such as 50, nor of minutes, such as 10m"):
        interval(text)


@pytest.mark.parametrize(
    "every, names",
    [
        (Every(), [2, 3]),
        (Every(iterations=1), [1, 2, 3]),
        (Every(minutes=1e-9), [1, 2, 3]),
        (Every(minutes=60), [2, 3]),
    ],
)
def test_a_run_is_saved_at_the_intervals_and_where_an_epoch_or_the_run_ends(tmp_path, every, names):
    """An epoch has two iterations."""
    ours = trainer(tmp_path)
    ours.saver.every = every
    ours.train(last_iteration=3), ours.saver.wait()
    assert [path.name for path in complete(tmp_path)] == [f"iteration_0000000{name}" for name in names]


def test_a_checkpoint_by_iterations_is_due_so_many_after_the_last_also_in_a_resumed_run(tmp_path):
    for last, names in ((4, [3, 4]), (9, [4, 7, 9])):  # the newest three stay
        ours = trainer(tmp_path, iterations=10, resume=last == 9)
        ours.saver.every = Every(iterations=3)
        ours.train(last_iteration=last), ours.saver.wait()
        assert [path.name for path in complete(tmp_path)] == [f"iteration_0000000{name}" for name in names]


def test_training_goes_on_while_a_checkpoint_is_written_which_holds_what_was_when_it_was_saved(tmp_path, monkeypatch):
    ours, proceed, write = trainer(tmp_path), threading.Event(), checkpoint.write
    ours.train(last_iteration=1), ours.saver.wait()

    def held(path, data):
        assert proceed.wait(20)
        return write(path, data)

    monkeypatch.setattr(checkpoint, "write", held)
    ours.engine.train()
    batches = ours.images.train.epoch(0, 1)
    ours.update(batches)
    before = gather_state(ours.engine)
    ours.save()
    ours.update(ours.images.train.epoch(1))
    assert ours.iteration == 3 and checkpoint.newest(tmp_path).name == "iteration_00000001"
    proceed.set()
    assert ours.saver.wait()
    tensors, state = checkpoint.load(checkpoint.newest(tmp_path))
    assert state["counters"]["iteration"] == 2
    now = gather_state(ours.engine)
    for kind in ("weights", "momentum"):
        assert all(torch.equal(tensor, getattr(before, kind)[name]) for name, tensor in tensors[kind].items())
        assert not torch.equal(tensors[kind]["fc.weight"], getattr(now, kind)["fc.weight"])


def test_the_number_of_threads_comes_back_unless_the_processes_are_others(tmp_path, monkeypatch):
    """Sums with another number of threads differ in their last bits."""
    threads, load_newest = torch.get_num_threads(), checkpoint.load_newest
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        torch.set_num_threads(2)
        ours = trainer(tmp_path)
        ours.train(last_iteration=1), ours.saver.wait()
        for world_size, expected in ((1, 2), (2, 3)):
            monkeypatch.setattr(
                checkpoint, "load_newest", lambda *given, size=world_size: with_world_size(load_newest(*given), size)
            )
            torch.set_num_threads(3)
            said = trainer(tmp_path, resume=True).reporter.progress.said
            assert torch.get_num_threads() == expected
            assert ("resuming on 1 process instead of 2: last bits may differ" in said) == (world_size == 2)
    finally:
        torch.set_num_threads(threads)


def test_a_changed_script_is_warned_of_if_the_checkpoint_has_one_and_the_run_trains(tmp_path):
    ours, said = trainer(tmp_path), []
    ours.saver.say = said.append
    for then, now, to_train in ((None, "a", True), ("a", "a", True), ("a", "b", False), ("a", "b", True)):
        assert not any("script has changed" in line for line in said), (then, now)
        ours.saver.described = {"script": then}
        ours.save(), ours.saver.wait()
        ours.saver.described = {"script": now}
        torch.manual_seed(len(said))
        before = torch.get_rng_state()
        ours.saver.restore(to_train)
        assert to_train or torch.equal(torch.get_rng_state(), before)
    assert any("script has changed" in line for line in said)


def test_a_resumed_run_says_which_keys_change_its_sums(tmp_path):
    ours, said = trainer(tmp_path), []
    ours.saver.say = said.append
    ours.saver.described = {"plan": {"config": {"train_micro_batch_size_per_gpu": 8}}}
    ours.save(), ours.saver.wait()
    ours.saver.described = {"plan": {"config": {"train_micro_batch_size_per_gpu": 16}}}
    ours.saver.restore()
    assert said[-1].startswith("train_micro_batch_size_per_gpu: not as in the checkpoint")


def test_a_saver_that_is_closed_has_written_all(tmp_path, monkeypatch):
    """A run that fails closes it, and its process ends right after that."""
    ours, write = trainer(tmp_path), checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *given: (time.sleep(0.1), write(*given))[1])
    ours.save(), ours.saver.close()
    assert len(complete(tmp_path)) == 1


def saved_broken_and_restored(folder):
    """Save on two processes, then with a NaN in a weight of rank 1.

    Return what is said, drawn next and restored, and whether this process had a copy of the weights.
    """
    engine = aggregating.run(aggregating.config(2, block=aggregating.OURS), iterations=1)
    rank, write = torch.distributed.get_rank(), checkpoint.save
    checkpoint.save = lambda *given: (time.sleep(0.2), write(*given))[1]  # not done when the second save comes
    copied = []
    lbsgd.train.saver.gather_state = lambda *given, **kept: copied.append(gather_state(*given, **kept)) or copied[-1]
    saver = Saver(engine, folder / str(rank), {}, {})  # only rank 0 has the checkpoint
    torch.manual_seed(rank)
    means = engine.module.bn.running_mean.clone()
    torch.distributed.all_reduce(means)
    saver.save(Reached(torch.tensor([0.1, 2.0], dtype=torch.float64), 1.5))
    drawn = torch.rand(3)
    if rank == 1:
        engine.module.fc.bias.data[0] = torch.nan
    with pytest.raises(DivergedError) as broken:
        saver.save(Reached(torch.zeros(2), 2.5))
    reached = saver.restore()
    torch.testing.assert_close(engine.module.bn.running_mean, means / 2)  # neither process's own
    assert rank or checkpoint.load(saver.newest)[1]["aggregation"] == saved_choice(engine) is not None
    reached = reached.totals.tolist(), reached.epoch_seconds
    return str(broken.value), drawn.tolist(), torch.rand(3).tolist(), reached, bool(copied[0].weights)


def test_two_processes_stop_for_what_one_finds_and_each_has_its_own_random_numbers_again(tmp_path):
    found = in_processes(2, saved_broken_and_restored, tmp_path)
    for said, drawn, drawn_again, reached, _ in found:
        assert said.startswith(
            "after iteration 0 the weights fc.bias are not numbers; the newest checkpoint is "
            f"{tmp_path / '0' / 'iteration_00000001'}; "
        )
        assert drawn == drawn_again and reached == ([0.1, 2.0], 1.5)
    assert found[0][1] != found[1][1] and not (tmp_path / "1").exists()
    assert [copied for *_, copied in found] == [True, False]  # each copy takes host memory


def with_world_size(loaded, world_size):
    return loaded._replace(state={**loaded.state, "world_size": world_size})


def test_the_loss_scale_and_the_skipped_updates_come_back_from_the_disk(tmp_path, monkeypatch):
    """fp16 from a loss scale of 2^24, which skips the first updates: equal bits to a run without a save."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)  # any CPU computes in fp16, slowly
    config = recipe(stage=1, micro_batch=64)
    set_precision(config, "fp16")
    config["fp16"] |= {"initial_scale_power": 24, "hysteresis": 1}
    engine, plan = lbsgd.initialize(network(), config)
    train(engine, plan, 0, 12)
    state = gather_state(engine)
    scale = state.counters["loss_scaler"]["cur_scale"]
    assert state.counters["skipped_iterations"] > 0 and scale < 2**24
    checkpoint.save(
        tmp_path, 12, {"weights": state.weights, "momentum": state.momentum, "random": {}}, {"counters": state.counters}
    )
    tensors, described = checkpoint.load(checkpoint.newest(tmp_path))
    again, _ = lbsgd.initialize(network(seed=1), config)
    restore_state(again, EngineState(tensors["weights"], tensors["momentum"], described["counters"]))
    assert (again.optimizer.loss_scaler.cur_scale, again.skipped_steps) == (scale, engine.skipped_steps)
    for one in (engine, again):
        train(one, plan, 12, 16)
    ours, theirs = gather_state(again), gather_state(engine)
    assert ours.counters == theirs.counters
    assert all(torch.equal(tensor, theirs.weights[name]) for name, tensor in ours.weights.items())


def test_a_checkpoint_by_minutes_is_due_again_only_so_many_minutes_after_the_last(tmp_path, monkeypatch):
    ours = trainer(tmp_path)
    ours.saver.saved_time, clock = 0, [0]  # whole seconds, because sums of fractions are rounded
    monkeypatch.setattr("lbsgd.train.saver.time", SimpleNamespace(monotonic=lambda: clock[0]))
    ours.saver.every = Every(minutes=10)
    for due_at in (600, 1200):
        clock[0] += 599
        assert not ours.saver.due_by_time()
        clock[0] += 1
        assert ours.saver.due_by_time(), due_at
        ours.save()
        assert not ours.saver.due_by_time()
    ours.saver.wait()
