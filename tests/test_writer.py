"""The resumable writer and the process pool: FFCV reads the file, interruptions leave no trace, a death is noticed."""

import contextlib
import errno
import io
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest
from converter import PAGE, append_images, blob
from PIL import Image
from stock_ffcv import read_by_stock_ffcv

from lbsgd.convert.beton_writer import (
    METADATA,
    METADATA_AT,
    RECORD,
    journal_block,
    page_size,
    read_journal,
)
from lbsgd.convert.image import COPIED, PIXELS, UNDECODABLE
from lbsgd.convert.process_pool import SLOT_BYTES, SLOTS, ProcessPool
from lbsgd.data.beton import BetonFile
from lbsgd.errors import ConfigError, DataError


def picture(number):
    """Return a JPEG of 40 x 30 pixels, colour or grey, a different one for each number."""
    pixels = Image.fromarray(np.random.default_rng(number).integers(0, 256, (3, 4, 3), np.uint8)).resize((40, 30))
    buffer = io.BytesIO()
    pixels.convert("L" if number % 3 == 0 else "RGB").save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


# --- the file ---------------------------------------------------------------------------------------------------------


def test_stock_ffcv_reads_grey_and_colour_jpegs_and_pixels(tmp_path):
    """By a memory map, and by pages. FFCV's fast inverse DCT makes its pixels differ from PIL's by some steps."""
    jpegs = [picture(number) for number in range(40)]
    expected = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in jpegs]
    kinds = [PIXELS if number % 4 == 0 else COPIED for number in range(40)]
    columns = kinds, expected, jpegs
    contents = [pixels.tobytes() if kind == PIXELS else data for kind, pixels, data in zip(*columns, strict=True)]
    append_images(tmp_path / "a.beton", contents, kinds=kinds)
    for images, labels in read_by_stock_ffcv(tmp_path / "a.beton", 40, os_caches=(True, False)):
        for number, (image, pixels) in enumerate(zip(images, expected, strict=True)):
            distance = np.abs(image.astype(int) - pixels)
            assert distance.max() <= (0 if kinds[number] == PIXELS else 8) and distance.mean() <= 1.5
        assert labels == [number % 5 for number in range(40)]


def test_no_image_lies_in_two_pages(tmp_path):
    append_images(tmp_path / "a.beton", [blob(number) for number in range(20)])
    beton = BetonFile.open(tmp_path / "a.beton")
    first, last = beton.images["data_at"], beton.images["data_at"] + beton.sizes - np.uint64(1)
    assert (first // PAGE == last // PAGE).all() and last[-1] // PAGE >= 4
    assert first[0] == METADATA_AT + 20 * METADATA.itemsize  # and small files stay small: no empty first page


def test_checksums_and_contents_are_those_of_the_images(tmp_path):
    contents = [blob(number) for number in range(6)]
    append_images(tmp_path / "a.beton", contents)
    beton, data = BetonFile.open(tmp_path / "a.beton"), (tmp_path / "a.beton").read_bytes()
    assert beton.checksums.tolist() == [zlib.crc32(content) for content in contents]
    assert [data[at : at + size] for at, size in zip(beton.images["data_at"], beton.sizes, strict=True)] == contents


def test_the_fingerprint_covers_every_bit_of_every_image(tmp_path):
    contents = [picture(number) for number in range(3)]
    append_images(tmp_path / "a.beton", contents)
    append_images(tmp_path / "b.beton", [contents[0], contents[1][:-1] + b"\0", contents[2]])
    assert BetonFile.open(tmp_path / "a.beton").fingerprint != BetonFile.open(tmp_path / "b.beton").fingerprint


def test_images_that_cannot_be_decoded_get_no_number(tmp_path):
    contents = [picture(0), b"", picture(2), b"", picture(4)]
    append_images(tmp_path / "a.beton", contents, kinds=[COPIED, UNDECODABLE, COPIED, UNDECODABLE, COPIED])
    beton = BetonFile.open(tmp_path / "a.beton")
    assert beton.labels.tolist() == [0, 2, 4]
    assert beton.checksums.tolist() == [zlib.crc32(contents[number]) for number in (0, 2, 4)]
    with pytest.raises(DataError, match="none of the 2 images can be decoded"):
        append_images(tmp_path / "b.beton", [b"", b""], kinds=[UNDECODABLE] * 2)


@pytest.mark.parametrize(
    "side, largest_source, raw, expected",
    [
        (500, 10**5, False, 1 << 23),
        (500, 10**9, True, 1 << 23),
        (4000, 10**7, False, 1 << 26),
        (4000, 10**5, True, 1 << 26),
        (65535, 10**6, False, 1 << 23),
        (65535, 10**9, True, 1 << 28),
    ],
)
def test_a_page_holds_an_image_of_the_size_asked_for(side, largest_source, raw, expected):
    assert page_size(side, largest_source, raw) == expected


# --- interruptions ----------------------------------------------------------------------------------------------------

CONTENTS = [blob(number) if number % 4 == 0 else picture(number) for number in range(12)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "a.beton"
    append_images(path, CONTENTS)
    return path.read_bytes()


@pytest.mark.parametrize("stop", range(13))
@pytest.mark.parametrize("lost_bytes", [0, 1, 10])
def test_an_interrupted_file_becomes_the_same_file(tmp_path, uninterrupted, stop, lost_bytes):
    """Commits come after every second image. A power failure may also remove the journal's last bytes."""
    path = tmp_path / "a.beton"
    append_images(path, CONTENTS, stop=stop, commit_each=2, finish=False).close()
    with open(path, "ab") as file:
        file.write(b"half of an image that came after the last commit")
    journal = path.with_suffix(".journal")
    os.truncate(journal, max(0, journal.stat().st_size - lost_bytes))
    committed = max(0, stop // 2 * 2 - (2 if lost_bytes else 0))
    append_images(path, CONTENTS, start=committed)
    assert path.read_bytes() == uninterrupted


def test_a_finished_file_can_be_finished_again(tmp_path, uninterrupted):
    path = tmp_path / "a.beton"
    for start in (0, 12, 12):
        append_images(path, CONTENTS, start=start)
        assert path.read_bytes() == uninterrupted


def test_a_journal_without_its_file_counts_for_nothing(tmp_path, uninterrupted):
    path = tmp_path / "a.beton"
    append_images(path, CONTENTS, stop=8, finish=False).close()
    path.unlink()
    append_images(path, CONTENTS, start=0)
    assert path.read_bytes() == uninterrupted


@pytest.mark.parametrize(
    "damage, whole_blocks",
    [
        (lambda data: data, 2),
        (lambda data: data[:-1], 1),
        (lambda data: data + bytes(50), 2),
        (lambda data: bytes(len(data)), 0),
        (lambda data: data[:20] + b"?" + data[21:], 0),
        (lambda data: data[:-5] + b"?" + data[-4:], 1),
        (lambda data: b"", 0),
    ],
)
def test_of_a_damaged_journal_only_whole_blocks_count(damage, whole_blocks):
    records = np.zeros(5, RECORD)
    records["num_bytes"] = range(5)
    blocks = [journal_block(records[:2]), journal_block(records[2:])]
    found, num_bytes = read_journal(damage(b"".join(blocks)))
    assert found["num_bytes"].tolist() == list(range((0, 2, 5)[whole_blocks]))
    assert num_bytes == sum(map(len, blocks[:whole_blocks]))


# --- processes --------------------------------------------------------------------------------------------------------


def make_job():
    def job(chunk, slot):
        time.sleep(0.02 * (chunk % 3 == 0))
        slot[:4] = chunk.to_bytes(4, "little")
        return chunk * chunk

    return job


@pytest.mark.parametrize("num_processes", [1, 2, 5])
@pytest.mark.parametrize("num_chunks", [0, 1, 40])
def test_results_come_in_order_with_their_slots(num_processes, num_chunks):
    with ProcessPool(num_processes, make_job) as pool:
        found = [(result, int.from_bytes(slot[:4], "little")) for result, slot in pool.results(range(num_chunks))]
    assert found == [(chunk * chunk, chunk) for chunk in range(num_chunks)]


def test_no_more_chunks_are_taken_than_there_are_slots():
    taken = []
    with ProcessPool(2, make_job) as pool:
        next(pool.results(taken.append(chunk) or chunk for chunk in range(100)))
    assert len(taken) == 2 * SLOTS and SLOT_BYTES * SLOTS < 100e6  # of the 200 MB that a process may use


def failing(error):
    def make():
        def job(chunk, _slot):
            if chunk == 7:
                raise error
            return chunk

        return job

    return make


@pytest.mark.parametrize(
    "error, kind", [(DataError("the disk of 7 is gone"), DataError), (KeyError("7"), RuntimeError)]
)
def test_what_a_process_raises_is_raised_here_after_the_chunks_before(error, kind):
    found = []
    with pytest.raises(kind, match="7"), ProcessPool(3, failing(error)) as pool:
        for result, _ in pool.results(range(20)):
            found.append(result)
    assert found == list(range(7))


@pytest.mark.parametrize("code", [signal.SIGKILL, 3])
def test_the_death_of_a_process_ends_the_work_within_seconds(code):
    def make():
        def job(chunk, _slot):
            if chunk == 4:
                os.kill(os.getpid(), code) if code == signal.SIGKILL else os._exit(code)
            time.sleep(60 * (chunk == 3))  # the others need not be waited for
            return chunk

        return job

    start = time.monotonic()
    reason = "killed by signal 9, as when memory runs out" if code == signal.SIGKILL else "exit code 3"
    with pytest.raises(DataError, match=f"died at 4: {reason}; what is done is kept"), ProcessPool(2, make) as pool:
        list(pool.results(range(10)))
    assert time.monotonic() - start < 5 and all(process.exitcode is not None for process in pool.processes)


@pytest.mark.parametrize("num_chunks", [2, 3, 10], ids=["within a result", "work unread", "before more work"])
def test_a_death_is_told_whatever_the_pipe_says(num_chunks):
    def make():
        def job(chunk, _slot):
            if chunk == 1:
                threading.Timer(0.2, os._exit, [3]).start()
            return bytes(chunk << 26)  # more than a pipe holds without a reader

        return job

    with pytest.raises(DataError, match="died at 1: exit code 3; what is done is kept"), ProcessPool(1, make) as pool:
        results = pool.results(range(num_chunks))
        assert next(results)[0] == b""
        pool.processes[0].join()
        next(results)


def test_a_death_is_told_at_the_chunk_at_work_also_if_results_before_it_wait_to_be_read():
    def make():
        def job(chunk, _slot):
            if chunk == 0:
                time.sleep(60)
            if chunk == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return chunk

        return job

    place, then = {each: f"number {each} of train" for each in range(6)}.__getitem__, "see to it"
    with pytest.raises(DataError) as raised, ProcessPool(2, make, place, then) as pool:
        list(pool.results(range(6)))
    reason = "killed by signal 9, as when memory runs out"
    assert (
        str(raised.value) == f"one of the processes that read the images died at number 5 of train: {reason}; see to it"
    )


def test_many_processes_may_have_their_files_open(monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, limits[1]))
    try:
        with ProcessPool(20, lambda: lambda chunk, _slot: chunk) as pool:
            assert [chunk for chunk, _ in pool.results(range(20))] == list(range(20))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    with pytest.raises(ConfigError, match="2,000 processes need 6,128 open files, and this system allows 4,096"):
        ProcessPool(2000, None)


@pytest.mark.parametrize("path_bytes", [10, 4_000, 400_000])
def test_large_chunks_and_large_results_never_wait_for_each_other(path_bytes):
    def make():
        def job(chunk, _slot):
            return chunk[0], bytes(1 << 20)  # more than a pipe holds without a reader

        return job

    chunks = [[number, *[f"{name:0{path_bytes}}" for name in range(32)]] for number in range(12)]
    with within_seconds(20), ProcessPool(2, make) as pool:
        assert [number for (number, _), _ in pool.results(chunks)] == list(range(12))


@contextlib.contextmanager
def within_seconds(seconds):
    def ring(*_):
        raise AssertionError(f"not done within {seconds} s")  # a TimeoutError is an OSError, like that of a pipe

    handler = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def test_processes_that_cannot_be_started_are_one_line_and_the_others_end(monkeypatch):
    fork, started = os.fork, []

    def fork_twice():
        if len(started) == 2:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        started.append(None)
        return fork()

    monkeypatch.setattr(os, "fork", fork_twice)
    with pytest.raises(ConfigError, match=r"cannot start process 3 of 12 \(Resource .*\); give fewer --num_processes"):
        ProcessPool(12, make_job)
    assert multiprocessing.active_children() == []  # Python would wait for them when it exits


SIGNALLED_AT_BIRTH = """
import os, signal, sys
from lbsgd.convert.process_pool import ProcessPool
from lbsgd.processes.signals import stoppable
from lbsgd.errors import DataError

def fork_and_signal(fork=os.fork):
    child = fork()
    if not child:
        os.kill(os.getpid(), int(sys.argv[1]))
    return child

os.fork = fork_and_signal
with stoppable("no help"):
    try:
        with ProcessPool(2, lambda: lambda chunk, slot: chunk) as pool:
            print(*[result for result, _ in pool.results(range(4))])
    except DataError as error:
        print(error)
"""


@pytest.mark.parametrize(
    "number, said",
    [
        (signal.SIGINT, "0 1 2 3"),
        (signal.SIGHUP, "0 1 2 3"),
        (signal.SIGTERM, "killed by signal 15"),
    ],
)
def test_a_signal_at_a_process_s_birth_is_neither_a_traceback_nor_lost(number, said):
    """The parent answers a terminal's signals for all of them. Python ends them with SIGTERM when it exits."""
    command = [sys.executable, "-c", SIGNALLED_AT_BIRTH, str(int(number))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert said in result.stdout and result.stderr == ""


def test_processes_end_with_their_parent():
    code = """
import os, sys, time
from lbsgd.convert.process_pool import ProcessPool
pool = ProcessPool(2, lambda: lambda chunk, slot: chunk)
print(*[process.pid for process in pool.processes], flush=True)
list(pool.results(range(3)))
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(os.path.exists(f"/proc/{pid}") for pid in pids)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_nothing_of_a_journal_without_its_file_comes_back_behind_new_blocks(tmp_path):
    path, contents = tmp_path / "train.beton", [blob(number) for number in range(4)]
    append_images(path, contents, stop=3, finish=False).close()
    path.unlink()
    append_images(path, contents, stop=1, finish=False).close()
    append_images(path, contents, start=1, stop=2, finish=False).close()


def test_a_journal_of_more_images_than_the_file_is_to_hold_counts_for_nothing(tmp_path):
    path, contents = tmp_path / "train.beton", [blob(number) for number in range(3)]
    append_images(path, contents, stop=3, finish=False).close()
    append_images(path, contents[:2], start=0)
