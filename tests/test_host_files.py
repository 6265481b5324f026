"""Files that the processes of a host share are made once, made again if damaged, and never taken from another user."""

import multiprocessing
import os
import tempfile
import time
from multiprocessing import forkserver
from types import SimpleNamespace

import numba
import numpy as np
import pytest
from commands import script

from lbsgd.algorithm.shuffle import epoch_order
from lbsgd.data import beton_survey, epoch_orders, host_files
from lbsgd.data.beton import BetonFile
from lbsgd.data.crops import random_resized_crop
from lbsgd.data.epoch_orders import host_order
from lbsgd.data.kept_code import keep
from lbsgd.errors import ConfigError


@pytest.fixture(scope="module")
def forks():
    """The server of `script`, begun where the temporary folder's name is short enough for its socket's."""
    forkserver.ensure_running()


@pytest.fixture(autouse=True)
def temporary(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return tmp_path / "temporary"


def make_once(path):
    def make():
        with open(path, "a") as file:
            file.write("made\n")
        time.sleep(0.1)  # while all others begin to wait
        return b"content"

    assert host_files.shared("order", "a", make).tobytes() == b"content"


def test_one_of_many_processes_makes_a_file_and_all_read_it(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=make_once, args=(tmp_path / "log",)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6
    assert (tmp_path / "log").read_text() == "made\n"


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: b"",
        lambda content: content[:70] + b"?",
        lambda content: b"lbsgd-h0" + content[8:],
    ],
)
def test_a_damaged_file_or_one_of_another_version_is_made_again(tmp_path, damage):
    make_once(tmp_path / "log")
    path = host_files.folder() / "order-a"
    path.write_bytes(damage(path.read_bytes()))
    make_once(tmp_path / "log")
    make_once(tmp_path / "log")
    assert (tmp_path / "log").read_text() == "made\n" * 2


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_that_others_may_write_into_is_not_used(temporary, mode):
    host_files.folder().chmod(mode)
    assert host_files.folder() is None
    assert host_files.shared("order", "a", lambda: b"content").tobytes() == b"content"
    assert not list((temporary / f"lbsgd-{os.getuid()}").iterdir())


def test_another_s_folder_and_a_link_to_a_folder_are_not_used(temporary, monkeypatch):
    """Compiled code is read from it, and old files in it are removed."""
    (temporary / "mine").mkdir(mode=0o700)
    (temporary / f"lbsgd-{os.getuid()}").symlink_to(temporary / "mine")
    assert host_files.folder() is None
    monkeypatch.setattr(os, "getuid", lambda: 12345)  # the folder was made by the user of this test
    assert host_files.folder() is None and (temporary / "lbsgd-12345").is_dir()


def test_torch_keeps_its_code_in_this_user_s_folder_or_a_run_that_compiles_is_refused(temporary, monkeypatch):
    """torch's own place has a name that anybody can make before, and what lies there is unpickled."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    host_files.folder().chmod(0o777)
    host_files.keep_torchs_code(compiles=False)
    with pytest.raises(ConfigError, match=f"--compile: {temporary}/lbsgd-.* is not a folder of this user alone"):
        host_files.keep_torchs_code(compiles=True)
    (temporary / f"lbsgd-{os.getuid()}").chmod(0o700)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    host_files.keep_torchs_code(compiles=True)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    host_files.keep_torchs_code(compiles=True)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == f"{host_files.folder()}/torchinductor"


@pytest.mark.parametrize(
    "flags, name, why",
    [
        (os.ST_NOEXEC | os.ST_NODEV, "temporary", "lies on a file system that is mounted noexec, "),
        (os.ST_NODEV, "my temporary", "has a space in its name, with which torch does not call the compiler"),
    ],
)
def test_torch_compiles_into_no_folder_in_which_that_must_fail(monkeypatch, tmp_path, flags, name, why):
    """A server may mount /tmp noexec, and torch's calls of the compiler quote no path."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that the variable is as before after the test
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / name).mkdir(exist_ok=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=flags))
    with pytest.raises(ConfigError, match=f"^--compile: .*/lbsgd-.* {why}.*; set TMPDIR or TORCHINDUCTOR_CACHE_DIR"):
        host_files.keep_torchs_code(compiles=True)
    host_files.keep_torchs_code(compiles=False)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(tmp_path / name))


@pytest.mark.parametrize("home", ["file", "home", "~", "absent/user"])
def test_triton_keeps_its_code_where_it_can_be_written(monkeypatch, tmp_path, home):
    """In a container the home folder is often /, which the user may not write. Triton would end with its error."""
    (tmp_path / "home").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", home if home == "~" else str(tmp_path / home))
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "file")
    for name in host_files.TRITONS_CODE:
        monkeypatch.delenv(name, raising=False)
    usable = home in ("home", "absent/user")  # Triton makes the folders that are missing
    host_files.keep_tritons_code()
    assert os.environ.pop("TRITON_CACHE_DIR", None) == (None if usable else f"{host_files.folder()}/triton")
    monkeypatch.setenv("TRITON_HOME", "mine")
    host_files.keep_tritons_code()
    assert "TRITON_CACHE_DIR" not in os.environ


def test_a_full_disk_costs_memory_and_ends_nothing(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert host_files.shared("order", "a", lambda: b"content").tobytes() == b"content"
    assert not list(host_files.folder().glob(".order*"))


def test_the_host_s_order_is_the_epoch_s_order():
    """Whatever other orders of runs and epochs are next to it."""
    for asked in ((1 << 18, 0, 0), (300_001, 3, 7), (300_001, 3, 8), (300_001, 4, 8), (300_000, 4, 8), (1000, 1, 1)):
        order = host_order(*asked)
        assert np.array_equal(order, epoch_order(*asked))
        assert (order.dtype == np.uint32) == (asked[0] >= epoch_orders.SHARED_FROM)


def test_another_version_of_numpy_draws_an_order_of_its_own(monkeypatch):
    first = host_order(1 << 18, 0, 0)
    monkeypatch.setattr(np, "__version__", "another")
    monkeypatch.setattr(epoch_orders, "shuffle", lambda order, seed, epoch: None)
    assert not np.array_equal(host_order(1 << 18, 0, 0), first)


def test_orders_of_epochs_that_are_over_do_not_stay_nor_what_a_killed_process_was_writing():
    folder, never = host_files.folder(), 1 << 22  # no process of Linux has this number
    for process in (never, os.getpid()):
        (folder / f".order-x.{process}").touch()
    for number, epoch in enumerate("abcde"):
        host_files.write("order", epoch, b"content")
        os.utime(folder / f"order-{epoch}", (number, number))  # a file system's clock may be coarse
    assert {path.name for path in folder.glob("order-*")} == {"order-d", "order-e"}
    assert [path.name for path in folder.glob(".order-*")] == [f".order-x.{os.getpid()}"]


def test_a_file_is_surveyed_once_per_version_and_at_once_after_it_was_written(tmp_path, monkeypatch):
    from test_beton import write_beton

    surveys = []
    whole_pass = beton_survey._Pass.survey
    monkeypatch.setattr(beton_survey._Pass, "survey", lambda self: surveys.append(1) or whole_pass(self))
    monkeypatch.setattr(beton_survey, "SHARED_FROM", 0)
    path = write_beton(tmp_path / "a.beton", [0, 1])
    os.utime(path, (0, 0))  # as a copy may keep the time of its source
    BetonFile.open(path)
    first = BetonFile.open(path)
    assert len(surveys) == 2  # written a moment ago, so the clock may not distinguish this version from the next
    monkeypatch.setattr(beton_survey, "SETTLED_SECONDS", -1.0)
    assert BetonFile.open(path).survey == BetonFile.open(path).survey == first.survey
    assert len(surveys) == 3
    monkeypatch.setattr(beton_survey, "VERSION", beton_survey.VERSION + 1)
    BetonFile.open(path)
    assert len(surveys) == 4
    write_beton(path, [0, 2])
    assert BetonFile.open(path).fingerprint != first.fingerprint


def test_sizes_of_a_table_in_another_order_are_found_by_image(tmp_path, monkeypatch):
    from test_beton import write_beton

    path = write_beton(tmp_path / "a.beton", range(5))  # lists its images in reverse
    expected = [50 + i for i in range(5)]
    assert BetonFile.open(path).sizes.tolist() == expected
    monkeypatch.setattr(beton_survey, "SHARED_FROM", 0)
    monkeypatch.setattr(beton_survey, "SETTLED_SECONDS", -1.0)
    assert BetonFile.open(path).sizes.tolist() == BetonFile.open(path).sizes.tolist() == expected
    assert len(list(host_files.folder().glob("sizes-*"))) == 1


START = """
import hashlib, sys, tempfile
tempfile.tempdir = None  # as in a new process, which asks TMPDIR
from numba.extending import is_jitted
from lbsgd.data.loaders import TrainLoader
from lbsgd.data.share import Cut, Pixels
from numba.typed import typeddict

cut = Cut(seed=0, global_batch=32, micro_batch=32)
loader = TrainLoader(sys.argv[1], cut, threads=2, pixels=Pixels(resolution=16, device="cpu"))
images, _ = next(loader.epoch(0))
[(stage, _)], _ = loader.images.pipeline.code
[crop] = [function for function in stage.__globals__.values() if is_jitted(function)]
kept = crop, typeddict._setitem, typeddict._make_dict
print(hashlib.sha256(images.numpy().tobytes()).hexdigest(), *(sum(each._cache_hits.values()) for each in kept))
"""


def test_compiled_code_is_kept_between_starts_gives_the_same_pixels_and_is_made_again_when_damaged(
    forks, digits_data, temporary
):
    (temporary / "start.py").write_text(START)

    def start():
        done = script(temporary / "start.py", digits_data / "train.beton", TMPDIR=temporary)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    compiled, kept = start(), start()
    assert compiled[1:] == ["0"] * 3 and kept[1:] == ["1"] * 3
    for path in host_files.folder().glob("code-*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    mended = start()
    assert mended[1:] == ["0"] * 3
    assert compiled[0] == kept[0] == mended[0]


def crops_of(scales):
    """Return a training crop for each scale, by functions that all stay alive. Each is compiled here or loaded."""

    def kept(scale):
        draw = random_resized_crop((scale, scale), flip=False)
        function = numba.njit(lambda image: np.array(draw(0, image, 100, 100)[:4]))
        keep(function)
        return function

    functions = [kept(scale) for scale in scales]
    return [function(0).tolist() for function in functions]


@pytest.mark.parametrize("starts", [([0.3], [0.6], [0.3, 0.6]), ([0.3], [0.3, 0.6], [0.3, 0.6])])
def test_functions_of_one_name_that_different_processes_compiled_do_not_meet_in_a_third(starts):
    """Numba numbers functions from 1 in each process. Two with one number were linked, or got one's constants."""
    context = multiprocessing.get_context("fork")
    expected = {scale: random_resized_crop((scale, scale), flip=False)(0, 0, 100, 100)[:4] for scale in (0.3, 0.6)}
    for scales in starts:
        with context.Pool(1) as pool:
            assert pool.apply(crops_of, (scales,)) == [list(expected[scale]) for scale in scales]
    assert len(list(host_files.folder().glob("code-*"))) == 2
