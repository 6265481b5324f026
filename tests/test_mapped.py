"""If a mapped file shrinks while it is read, the process ends with one line. Any other bus error remains one."""

import signal
import subprocess
import sys

import pytest

PAGES = 3
BEGIN = f"""
import gc, mmap, os, signal, sys, threading
from pathlib import Path
from lbsgd.data.mapped import mapped
one, other = Path("one.beton"), Path("other.beton")
for path in (one, other):
    path.write_bytes(bytes({PAGES} * mmap.PAGESIZE))
content = mapped(one, "put it back"), mapped(other, "remove it")
def shrink(path):
    os.truncate(path, mmap.PAGESIZE)
def last_of(kept):
    return int(kept[-1])
def unwatched():
    with open(other, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
"""


def end_of(code, folder):
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "code, file, way_out",
    [
        ("shrink(one); last_of(content[0])", "one.beton", "put it back"),
        ("shrink(other); last_of(content[1])", "other.beton", "remove it"),
        ("os.truncate(one, 0); int(content[0][0])", "one.beton", "put it back"),
        # Module globals whose names begin with _ are deleted first, after all functions of atexit.
        ("_end = type('End', (), {'__del__': lambda self: (shrink(one), last_of(content[0]))})()", "one", "put it"),
        ("more = mapped(one, 'a third'); del more; gc.collect(); shrink(one); last_of(content[0])", "one", "put it"),
        (
            "shrink(one); [threading.Thread(target=last_of, args=content[:1]).start() for _ in range(8)]",
            "one.beton",
            "put it back",
        ),
    ],
)
def test_a_file_that_shrinks_ends_its_reader_with_one_line(tmp_path, code, file, way_out):
    exit_code, said = end_of(code, tmp_path)
    assert (exit_code, said.count("\n")) == (2, 1)
    assert said.startswith(f"error: {file}") and "shorter" in said and f"; {way_out}" in said


@pytest.mark.parametrize(
    "code",
    [
        "kept = unwatched(); shrink(other); last_of(kept)",
        "os.kill(os.getpid(), signal.SIGBUS)",
        "del content; gc.collect(); kept = unwatched(); shrink(other); last_of(kept)",  # at the address of one of them
    ],
    ids=["another mapping", "sent", "a mapping in the old place"],
)
def test_a_bus_error_of_another_cause_stays_one(tmp_path, code):
    assert end_of(code, tmp_path) == (-signal.SIGBUS, "")


def test_who_had_the_signal_before_keeps_the_bus_errors_that_are_not_ours(tmp_path):
    code = "kept = unwatched(); shrink(other); last_of(kept)"
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", BEGIN + code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGBUS and done.stderr.startswith("Fatal Python error: Bus error")


def test_what_is_within_the_file_is_read_as_ever(tmp_path):
    assert end_of("shrink(one); assert int(content[0][0]) == 0 and not content[0].flags.writeable", tmp_path) == (0, "")
