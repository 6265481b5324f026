"""After a signal, a killed process or a full disk, the same command goes on and ends with the same bytes."""

import contextlib
import errno
import fcntl
import gc
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from converter import JPEG, ROOT, SETTINGS, TOOL, make_tree, names_in, run_tool, save, stored

from lbsgd.convert import convert_split
from lbsgd.convert.beton_writer import RECORD, BetonWriter, read_journal
from lbsgd.convert.convert import convert, look
from lbsgd.convert.image import COPIED
from lbsgd.errors import ConfigError, DataError


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "source")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A source with many images, and the data folder made of it: (source, folder)."""
    folder = tmp_path_factory.mktemp("whole")
    make_tree(folder / "source")
    for number in range(40):
        save(folder / f"source/train/ant/{number}.JPEG", phase=number)
    convert(folder / "source", folder / "data", **SETTINGS)
    return folder / "source", folder / "data"


def assert_same_files(data, expected):
    assert names_in(data) == ["manifest.json", "train.beton", "val.beton"]
    for name in names_in(data):
        assert (data / name).read_bytes() == (expected / name).read_bytes()


KILLER = """
import contextlib, os, random, shutil, signal, sys, time
from pathlib import Path
from lbsgd.convert import convert_split
from lbsgd.convert.beton_writer import RECORD
from lbsgd.convert.convert import convert

source, folder = map(Path, sys.argv[1:])
convert_split.CHUNK_IMAGES, convert_split.COMMIT_SECONDS, quick = 4, 0.01, convert_split.stored_image

def slow(*arguments, **options):  # so that a moment can fall anywhere into the work
    time.sleep(0.008)
    return quick(*arguments, **options)

def start():
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        convert(source, folder, max_side=150, num_processes=2)
        os._exit(0)
    return child

def has_ended(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

def journal_bytes():
    with contextlib.suppress(OSError):  # renamed or removed meanwhile
        return sum(path.stat().st_size for path in (folder / ".converting").glob("*.journal"))
    return 0

def there():
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.name != ".converting"}

os.waitpid(start(), 0)
reference = there()
assert len(reference) == 3
shutil.rmtree(folder)
convert_split.stored_image = slow
random.seed(0)
whole = 170 * RECORD.itemsize  # bytes of both journals, at least
kills, ends, journals = 0, 0, set()
while kills < 20 or not ends:
    child, target = start(), journal_bytes() + random.uniform(0, 0.2) * whole
    latest = time.monotonic() + random.choice((0.05, 60, 60))  # some before anything is in a journal
    while journal_bytes() < target and time.monotonic() < latest and not has_ended(child):
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.01))
    os.kill(child, signal.SIGKILL)
    killed = os.waitpid(child, 0)[1] == signal.SIGKILL
    kills += killed
    assert all(content == reference[name] for name, content in there().items())  # complete, or not there
    assert "manifest.json" not in there() or there() == reference
    if not killed:
        assert there() == reference
        ends += 1
        shutil.rmtree(folder)
    elif (journal := folder / ".converting/train.journal").exists():
        journals.add(journal.stat().st_size)
_, status = os.waitpid(start(), 0)
assert status == 0 and there() == reference
print(len(journals), ends)
"""


def test_killed_at_20_random_moments_it_ends_with_the_same_bytes(tmp_path):
    """The moments are counted in events, not in seconds, so that they fall into the work on a busy machine, too."""
    for number in range(160):
        save(tmp_path / f"source/train/{number % 2}/{number:03}.JPEG", size=(160 + number % 7, 170), phase=number)
        if number % 16 == 0:
            save(tmp_path / f"source/val/{number % 32 // 16}/{number:03}.JPEG", phase=number)
    command = [sys.executable, "-c", KILLER, tmp_path / "source", tmp_path / "data"]
    output = subprocess.check_output(command, cwd=ROOT, text=True)
    different_journals, ends = map(int, output.split())
    assert different_journals >= 4 and ends >= 1  # or the moments missed the work


def test_work_for_other_images_or_settings_is_not_taken_up_and_a_line_says_so(tree, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("lbsgd.convert.convert.publish", lambda *_: None)
        convert(tree, tmp_path / "data", **SETTINGS)
        save(tree / "train/ant/1.JPEG", phase=7)  # another picture, which a journal would not notice
    assert "begins again" not in capsys.readouterr().out
    convert(tree, tmp_path / "data", **SETTINGS)
    assert "data/.converting holds work on other images or settings, or of another version: it begins again\n" in (
        capsys.readouterr().out
    )
    assert stored(tmp_path / "data/train.beton")[0] == (tree / "train/ant/1.JPEG").read_bytes()


@contextlib.contextmanager
def another_process_converts(data):
    code = (
        "import sys, time, lbsgd.convert.work_folder as w; from pathlib import Path\n"
        "with w.converting_alone(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    )
    data.mkdir(exist_ok=True)
    other = subprocess.Popen([sys.executable, "-c", code, data / ".converting"], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        other.stdout.readline()
        yield
    finally:
        other.kill()
        other.wait()


def test_two_conversions_into_one_folder_are_refused(tree, tmp_path):
    with another_process_converts(tmp_path / "data"):
        with pytest.raises(DataError, match="another process is converting into .*data"):
            convert(tree, tmp_path / "data", **SETTINGS)
        *_, last = look(tree, tmp_path / "data", 1, max_side=500).splitlines()
        assert last.startswith("refused: another process is converting into ")
    assert "refused" not in look(tree, tmp_path / "data", 1, max_side=500)
    convert(tree, tmp_path / "data", **SETTINGS)


def test_a_second_command_leaves_the_work_of_a_running_one(tree, tmp_path):
    """Even if the folder is complete, because the first command has --overwrite, and an archive must be unpacked."""
    data, source = tmp_path / "data", shutil.make_archive(str(tmp_path / "source"), "gztar", tree)
    convert(source, data, **SETTINGS)
    with another_process_converts(data):
        (data / ".converting/12345678.partial").write_bytes(b"of a process on another host")
        before = names_in(data / ".converting")
        with pytest.raises(DataError, match="another process is converting into .*data"):
            convert(source, data, **SETTINGS)
        assert names_in(data / ".converting") == before
    convert(source, data, **SETTINGS)
    assert names_in(data) == ["manifest.json", "train.beton", "val.beton"]


@pytest.mark.parametrize("number, held", [(errno.EACCES, True), (errno.ENOLCK, False), (errno.ENOSYS, False)])
def test_a_file_system_without_locks_is_told_and_used(tree, tmp_path, monkeypatch, capsys, number, held):
    def lockf(_file, _how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with pytest.raises(DataError, match="another process is converting") if held else contextlib.nullcontext():
        convert(tree, tmp_path / "data", **SETTINGS)
    told = f"{tmp_path}/data lies on a file system without locks ({os.strerror(number)})"
    assert (told in capsys.readouterr().out) != held and (tmp_path / "data/manifest.json").exists() != held


def test_a_command_that_begins_while_another_one_publishes_finds_it_complete(tree, tmp_path, monkeypatch, capsys):
    """It has opened the lock of a folder that is then removed."""
    data, take = tmp_path / "data", fcntl.lockf
    convert(tree, tmp_path / "made", **SETTINGS)

    def take_after_publication(lock, how):
        if not (data / "manifest.json").exists():
            shutil.rmtree(data)
            shutil.copytree(tmp_path / "made", data)
        take(lock, how)

    monkeypatch.setattr(fcntl, "lockf", take_after_publication)
    convert(tree, data, **SETTINGS)
    assert capsys.readouterr().out.endswith("2 classes; --overwrite makes it again\n")
    assert_same_files(data, tmp_path / "made")


def test_a_complete_folder_that_cannot_be_written_to_is_found_complete(tree, tmp_path, monkeypatch, capsys):
    data, source = tmp_path / "data", shutil.make_archive(str(tmp_path / "source"), "gztar", tree)
    convert(source, data, **SETTINGS)
    monkeypatch.setattr("lbsgd.convert.existing_data.os.access", lambda folder, _: folder != data)
    monkeypatch.setattr("lbsgd.convert.work_folder.fcntl", None)
    convert(source, data, **SETTINGS)
    assert "is complete" in capsys.readouterr().out
    assert names_in(data) == ["manifest.json", "train.beton", "val.beton"]


@pytest.mark.parametrize("change", ["settings", "source", "images"])
def test_a_refused_command_leaves_nothing_of_its_own_and_the_work_that_was_there(tree, tmp_path, monkeypatch, change):
    data, source = tmp_path / "data", Path(shutil.make_archive(str(tmp_path / "source"), "gztar", tree))
    convert(source, data, **SETTINGS)
    settings = SETTINGS | ({"quality": 80} if change == "settings" else {})
    if change == "source":
        source = shutil.copy(source, tmp_path / "other.tar.gz")
    if change == "images":
        save(tree / "val/bee/new.JPEG")
        shutil.make_archive(str(tmp_path / "source"), "gztar", tree)
    else:
        monkeypatch.setattr("lbsgd.convert.sources.uncompressed", None)  # not needed to tell
    for work in ([], ["train.beton", "train.journal", "old.tar"]):
        for name in work:
            (data / ".converting").mkdir(exist_ok=True)
            (data / ".converting" / name).write_bytes(b"")
        with pytest.raises(DataError, match="already holds another data set: .* differs in "):
            convert(source, data, **settings)
        assert [name for name in names_in(data / ".converting") if name != "lock"] == sorted(work)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_ends_at_once_and_says_how_to_go_on(tmp_path, number):
    for image in range(4):
        save(tmp_path / f"source/{'train' if image % 2 else 'val'}/a/{image}.JPEG", size=(1200, 1200), subsampling=0)
    for image in range(800):
        os.link(tmp_path / "source/train/a/1.JPEG", tmp_path / f"source/train/a/more{image}.JPEG")
    process = subprocess.Popen(
        [sys.executable, TOOL, "--source", "source", "--data_dir", "data"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "data/.converting/val.journal").exists():
        time.sleep(0.02)
        assert process.poll() is None
    time.sleep(0.5)
    process.send_signal(number)
    asked = time.monotonic()
    _, errors = process.communicate()
    assert time.monotonic() - asked < 3 and process.returncode == 75
    assert errors == (
        f"stopped: {number.name}; what is done is kept in data/.converting: the same command goes on from there\n"
    )


def test_the_death_of_a_process_ends_the_conversion_which_can_go_on(tree, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(convert_split, "stored_image", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        at = f"{tree}/train/ant/1.JPEG to {tree}/train/bee/1.JPEG"
        said = f"died at {at}: killed by signal 9, as when memory runs out; what is done is kept"
        with pytest.raises(DataError, match=re.escape(said)):
            convert(tree, tmp_path / "data", **SETTINGS)
    assert names_in(tmp_path / "data") == [".converting"]
    convert(tree, tmp_path / "data", **SETTINGS)


def test_the_death_of_a_process_is_told_also_if_more_work_waits_for_it(whole, tmp_path, monkeypatch):
    """The kernel then resets the connection, which was once mistaken for a folder that cannot be written to."""
    monkeypatch.setattr(convert_split, "stored_image", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DataError, match="died at .*: killed by signal 9"):
        convert(whole[0], tmp_path / "data", **{**SETTINGS, "num_processes": 1})


def test_a_process_that_a_lost_file_has_ended_is_not_told_by_its_exit_code(tree, tmp_path, monkeypatch):
    """Its own line went to the stderr that OpenCV's messages are kept from."""
    monkeypatch.setattr(convert_split, "stored_image", lambda *_, **__: os._exit(DataError.exit_code))
    with pytest.raises(DataError, match="died at .*: a file can no longer be read: it was made shorter, or its disk"):
        convert(tree, tmp_path / "data", **SETTINGS)


def test_processes_for_which_there_is_no_memory_are_not_taken_for_a_folder_that_cannot_be_written(
    tree, tmp_path, monkeypatch
):
    def full(*_):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("mmap.mmap", full)
    with pytest.raises(ConfigError, match="no memory for 1 process, .* each .*; give fewer --num_processes"):
        convert(tree, tmp_path / "data", **{**SETTINGS, "num_processes": 1})


def test_a_full_disk_ends_the_conversion_which_can_go_on(tree, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(DataError, match="cannot write to .*data: File too large; what is done is kept: make room"):
            convert(tree, tmp_path / "data", **SETTINGS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names_in(tmp_path / "data") == [".converting"]
    convert(tree, tmp_path / "data", **SETTINGS)


@pytest.mark.parametrize("num_bytes", [0, 5, 30, 3000])
def test_a_disk_that_fills_up_is_one_line_and_the_same_command_goes_on(whole, tmp_path, num_bytes):
    """A limit on the file size stands for the full disk, at the identity, the journal or the images."""
    source, expected = whole
    limited = ["bash", "-c", f'trap \'\' XFSZ; exec prlimit --fsize={num_bytes} "$0" "$@"', sys.executable, TOOL]
    flags = ["--source", str(source), "--data_dir", "data"]
    result = subprocess.run([*limited, *flags], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and not {*names_in(tmp_path)} - {"data"}
    assert not (tmp_path / "data").exists() or names_in(tmp_path / "data") == [".converting"]  # nothing half-written
    assert result.stderr == (
        "error: cannot write to data: File too large; what is done is kept: make room and run the same "
        "command, or name another folder with --data_dir\n"
    )
    assert run_tool(tmp_path, *flags).returncode == 0
    assert_same_files(tmp_path / "data", expected)


def test_a_journal_of_which_the_disk_takes_a_part_is_a_full_disk(tmp_path, monkeypatch):
    writer = BetonWriter(tmp_path / "a.beton", 1, 1 << 23)
    writer.append(np.array([(COPIED, 64, 64, len(JPEG), 0, 0)], RECORD), memoryview(JPEG))
    monkeypatch.setattr(os, "write", lambda _file, data: len(data) - 1)
    with pytest.raises(OSError, match="No space left"):
        writer.commit(1)


def test_commits_write_each_image_once_however_often_they_come(tmp_path):
    """Including one that is due at the very end, whose images were once written twice."""
    writer = BetonWriter(tmp_path / "a.beton", 50, 1 << 23)
    with convert_split.Commits(writer, 0) as commits:
        for _ in range(50):
            writer.append(np.array([(COPIED, 64, 64, len(JPEG), 0, 0)], RECORD), memoryview(JPEG))
            commits.start_if_due()
    records, _ = read_journal((tmp_path / "a.journal").read_bytes())
    assert len(records) == 50 and len(set(records["data_at"].tolist())) == 50


def test_a_conversion_that_is_stopped_waits_for_its_commit(tmp_path, monkeypatch):
    """Otherwise it could write the journal at the same time as the next command, which begins once the lock is free."""
    writer, slow = BetonWriter(tmp_path / "a.beton", 1, 1 << 23), os.fdatasync
    writer.append(np.array([(COPIED, 64, 64, len(JPEG), 0, 0)], RECORD), memoryview(JPEG))
    monkeypatch.setattr(os, "fdatasync", lambda file: (time.sleep(0.5), slow(file)))
    with contextlib.suppress(KeyboardInterrupt), convert_split.Commits(writer, 0) as commits:
        commits.start_if_due()
        raise KeyboardInterrupt
    assert not commits.thread.is_alive()


def test_an_error_of_a_commit_is_raised_where_the_images_are_written(tmp_path, monkeypatch):
    writer = BetonWriter(tmp_path / "a.beton", 1, 1 << 23)
    writer.append(np.array([(COPIED, 64, 64, len(JPEG), 0, 0)], RECORD), memoryview(JPEG))
    monkeypatch.setattr(os, "write", lambda _file, data: len(data) - 1)
    with pytest.raises(OSError, match="No space left"), convert_split.Commits(writer, 0) as commits:
        commits.start_if_due()
        commits.thread.join()
        commits.start_if_due()


def test_conversions_that_fail_leave_no_files_open(tree, tmp_path):
    (tree / "train/ant/1.JPEG").write_text("no image")
    opened = []
    for _ in range(3):
        with contextlib.suppress(DataError):
            convert(tree, tmp_path / "data", **SETTINGS)
        gc.collect()
        opened.append(len(os.listdir("/proc/self/fd")))
    assert opened[0] == opened[-1]


def test_finished_or_begun_work_of_other_libraries_is_done_again(tmp_path, monkeypatch, capsys):
    source, data = make_tree(tmp_path / "source"), tmp_path / "data"
    with monkeypatch.context() as patch:
        patch.setattr("lbsgd.convert.convert.publish", lambda *_: None)
        patch.setattr("lbsgd.convert.work_folder.libraries", lambda: {"pillow": "another"})
        convert(source, data, **SETTINGS)
    capsys.readouterr()
    convert(source, data, **SETTINGS)
    said = capsys.readouterr().out
    assert "holds work on other images or settings, or of another version: it begins again" in said
    assert "it only goes to" not in said and (data / "manifest.json").exists()
