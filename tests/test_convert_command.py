"""The command `lbsgd convert`, also as tools/convert_imagenet_to_ffcv.py: its flags, its lines and its bar."""

import contextlib
import errno
import io
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from converter import ROOT, SETTINGS, TOOL, change_byte, make_tree, names_in, run_tool, save
from locked import as_nobody

from lbsgd.commands.main import main
from lbsgd.convert.beton_writer import BetonWriter
from lbsgd.convert.convert import convert
from lbsgd.convert.progress import Meter
from lbsgd.convert.work_folder import writing_to
from lbsgd.data.beton import BetonFile
from lbsgd.data.folder import open_data
from lbsgd.errors import DataError
from lbsgd.output import OutputError


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "source")


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Return a function that runs `lbsgd convert` in tmp_path, in this process: starting Python takes a second."""
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        try:
            code = main(["convert", *flags])
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(flags, code, out, err)

    return run


@pytest.mark.parametrize(
    "flags, environment, looked_for",
    [
        ([], {}, "data/imagenet"),
        ([], {"IMAGENET_DIR": "elsewhere"}, "elsewhere"),
        (["--source", "here"], {"IMAGENET_DIR": "elsewhere"}, "here"),
    ],
)
def test_the_command_says_what_it_looked_for(command, monkeypatch, flags, environment, looked_for):
    monkeypatch.delenv("IMAGENET_DIR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = command(*flags)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {looked_for}: does not exist; name your copy of ImageNet with: ")
    assert result.stderr.count("\n") == 1
    assert "lbsgd convert --source IMAGENET --data_dir data/imagenet_ffcv" in result.stderr


def test_the_command_looks_converts_and_verifies_in_plain_lines(tree, tmp_path):
    result = run_tool(tmp_path, "--source", "source", "--dry_run", IMAGENET_FFCV_DIR="made")
    assert (result.returncode, result.stderr) == (0, "") and not (tmp_path / "made").exists()
    lines = result.stdout.splitlines()
    assert lines[0].startswith("found   source/train: 3 training images") and lines[2] == "classes 2, from ant to bee"
    assert "100% of the images untouched" in lines[3] and lines[4].startswith("time    about 0 s with")

    result = run_tool(tmp_path, "--source", "source", IMAGENET_FFCV_DIR="made")
    assert (result.returncode, result.stderr) == (0, "")
    assert [line.split(" in ")[0] for line in result.stdout.splitlines()] == ["train: 3 images", "val: 2 images"]
    assert open_data(tmp_path / "made").num_classes == 2

    change_byte(tmp_path / "made/val.beton", int(BetonFile.open(tmp_path / "made/val.beton").images["data_at"][0]))
    result = run_tool(tmp_path, "--verify", IMAGENET_FFCV_DIR="made")
    assert result.returncode == 2 and result.stderr.startswith("error: made/val.beton: image 0 (label 0) is damaged")


def test_names_that_are_no_utf_8_are_printed_and_converted(tree, tmp_path):
    (tree / "train/ant").rename(tree / "train" / os.fsdecode(b"\xff"))
    (tree / "val/ant").rename(tree / "val" / os.fsdecode(b"\xff"))
    (tree / "train" / os.fsdecode(b"bee/\xfe.JPEG")).write_text("no image")
    for flags in (["--dry_run"], ["--on_error", "skip"], []):
        result = run_tool(tmp_path, "--source", "source", "--data_dir", "data", *flags, PYTHONIOENCODING="utf-8:strict")
        assert (result.returncode, result.stderr) == (0, "")
        assert ("\\udcff" in result.stdout) == (flags == ["--dry_run"])
        assert ("cannot be decoded: source/train/bee/\\udcfe.JPEG" in result.stdout) == ("skip" in flags)


def test_a_name_in_an_archive_moves_no_cursor(command, tmp_path):
    """A tar's names come from a stranger, and an escape sequence in one could clear the screen."""
    tree = make_tree(tmp_path / "source")
    (tree / "train/bee/\x1b[2J.JPEG").write_text("no image")
    (tree / "train/bee/\x1b]0;title\a.txt").write_text("no image")
    with tarfile.open("source.tar", "w") as tar:
        tar.add(tree, ".")
    done = command("--source", "source.tar", "--data_dir", "data", "--on_error", "skip")
    assert "cannot be decoded: source.tar/train/bee/?[2J.JPEG" in done.stdout
    assert "(bee/?]0;title?.txt)" in done.stdout and "\x1b" not in done.stdout


def test_a_name_with_a_line_end_begins_no_line(command, tree):
    (tree / "train/bee/1\nfound   nothing.JPEG").write_text("no image")
    (tree / "train/bee/\nresult  none.txt").write_text("no image")
    flags = "--source", "source", "--data_dir", "data"
    shown = command(*flags, "--dry_run").stdout
    assert "bee/1?found   nothing.JPEG" in shown and "(bee/?result  none.txt)" in shown
    assert [line.split()[0] for line in shown.splitlines()].count("found") == 2
    failed = command(*flags)
    assert "cannot be decoded: source/train/bee/1?found   nothing.JPEG: " in failed.stdout
    assert failed.stderr.startswith("error: source: 1 of 6 images") and failed.stderr.count("\n") == 1


DIES = """
import os, signal, sys
import lbsgd.convert.convert, lbsgd.convert.verify
from lbsgd.commands.main import main
from lbsgd.convert.sources import find_source

def asked_to_stop(path, scratch, data_dir):
    find_source(path, scratch, data_dir)
    assert any(scratch.iterdir())
    os.kill(os.getpid(), int(sys.argv[1]))
    signal.pause()

lbsgd.convert.convert.find_source = lbsgd.convert.verify.find_source = asked_to_stop
sys.exit(main(["convert", "--source", "source.tar.gz", "--data_dir", "data", sys.argv[2]]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("flag", ["--dry_run", "--verify"])
def test_looking_and_verifying_end_at_a_signal_without_a_trace(tree, tmp_path, number, flag):
    """Neither a traceback nor an unpacked archive in TMPDIR is left behind."""
    convert(shutil.make_archive(str(tmp_path / "source"), "gztar", tree), tmp_path / "data", **SETTINGS)
    (tmp_path / "scratch").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "scratch"), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", DIES, str(int(number)), flag],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 75
    assert result.stderr == f"stopped: {number.name}; nothing of it is kept: the same command begins again\n"
    assert names_in(tmp_path / "scratch") == []


def test_the_tool_is_the_command(tmp_path, command):
    """Same output, same exit code. --help needs neither NumPy nor the converter's modules."""
    for flags in (["--help"], ["--source", "nowhere"], ["--turbo"]):
        tool, ours = run_tool(tmp_path, *flags, COLUMNS="80"), command(*flags)
        assert (tool.returncode, tool.stdout, tool.stderr) == (ours.returncode, ours.stdout, ours.stderr)
    code = (
        "import sys; from lbsgd.commands.convert import parser; parser()\n"
        "sys.exit(any(name in sys.modules for name in ('numpy', 'lbsgd.convert.convert')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("flags", [["--source", "source"], ["--source", "source", "--dry_run"], ["--verify"]])
def test_without_opencv_the_command_says_how_to_get_it(tree, tmp_path, command, monkeypatch, flags):
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/cv2.py").write_text("raise ImportError('libGL.so.1 is missing')")
    monkeypatch.syspath_prepend(tmp_path / "hidden")
    monkeypatch.delitem(sys.modules, "cv2", raising=False)
    result = command(*flags)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and not (tmp_path / "data").exists()
    assert "libGL.so.1 is missing" in result.stderr and "make setup" in result.stderr


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--quality", "0"], "--quality: '0'"),
        (["--max_side", "9", "--short_side", "9"], "give one of the two"),
        (["--num_processes", "0"], "'0' is not a whole number of at least 1"),
        (["--num_workers", "0", "--dry_run"], "--num_workers"),  # its former name
        (["--num_workers", "-1", "--verify"], "'-1' is not a whole number"),
        (["--num_workers", "two"], "'two' is not a whole number of at least 1"),
        (["--max_side", "0"], "--max_side: '0'"),
        (["--short_side", "-5"], "--short_side: '-5'"),
        (["--short_side", "x"], "--short_side"),
        (["--raw_fraction", "1.5"], "--raw_fraction: '1.5' is not a number from 0 to 1"),
        (["--raw_fraction", "nan"], "--raw_fraction: 'nan'"),
        (["--on_error", "ask"], "--on_error"),
        (["--turbo"], "--turbo"),
        (["more"], "more"),
        (["--data_dir"], "--data_dir"),
        (["--verify", "--dry_run"], "--verify does not go with --dry_run"),
        (["--verify", "--max_side", "9"], "--verify does not go with --max_side"),
        (["--verify", "--quality", "9"], "--verify does not go with --quality"),
        (["--verify", "--overwrite"], "--verify does not go with --overwrite"),
        (["--verify", "--on_error", "skip"], "--verify does not go with --on_error"),
    ],
)
def test_flags_that_cannot_be_are_refused_in_one_line(tree, tmp_path, command, flags, message):
    result = command("--source", "source", *flags)
    assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ") and names_in(tmp_path) == ["source"]


def test_long_conversions_print_a_line_now_and_then(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lbsgd.convert.progress.LINE_SECONDS", 0)
    monkeypatch.setattr("lbsgd.convert.convert_split.CHUNK_IMAGES", 1)
    convert(tree, tmp_path / "data", **SETTINGS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("train: 1 of 3 images, ") and "images/s" in lines[0] and lines[0].endswith(" left")


def test_progress_and_result_count_the_images_that_failed_also_those_of_an_earlier_run(
    tree, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("lbsgd.convert.progress.LINE_SECONDS", 0)
    monkeypatch.setattr("lbsgd.convert.convert_split.CHUNK_IMAGES", 1)
    (tree / "train/ant/1.JPEG").write_text("no image")
    append = BetonWriter.append

    def append_two(writer, records, data):
        if writer.done == 2 and len(records):
            raise OSError(28, "No space left on device")
        append(writer, records, data)
        writer.commit(writer.done)

    with monkeypatch.context() as short_of_room:
        short_of_room.setattr(BetonWriter, "append", append_two)
        with pytest.raises(DataError, match="make room"):
            convert(tree, tmp_path / "data", **SETTINGS)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("train: 1 of 3 images, 1 failed, ") and second.startswith(
        "train: 2 of 3 images, 1 failed, "
    )
    convert(tree, tmp_path / "data", on_error="skip", **SETTINGS)
    again, last, total, *others = capsys.readouterr().out.splitlines()
    assert again == "train: goes on after 2 of 3 images, 1 failed"
    assert last.startswith("train: 3 of 3 images, 1 failed, ")
    assert total.startswith("train: 1 images in ") and ", 1 failed, " in total
    assert not any("failed" in line for line in others)


def on_a_terminal(folder, columns, **environment):
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, TOOL, "--source", "source"],
        cwd=folder,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", **environment},
    )
    os.close(theirs)
    text = b""
    with contextlib.suppress(OSError):  # how a terminal signals its end
        # Some kernels do not wake a reader when the last writer closes.
        while select.select([ours], [], [], 0.5)[0] or process.poll() is None:
            text += os.read(ours, 4096) if select.select([ours], [], [], 0)[0] else b""
    os.close(ours)
    assert process.wait() == 0
    return text.decode()


def screen(text):
    """Return the lines that a terminal shows at the end."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", text):
        row += {"\n": 1, "\x1b[1A": -1}.get(part, 0)
        lines += [""] * (row + 1 - len(lines))
        lines[row] = "" if part == "\x1b[2K" else lines[row] + part * (part[0] not in "\x1b\r\n")
    return [line for line in lines if line]


@pytest.mark.parametrize("columns", [80, 120])
def test_on_a_terminal_there_is_a_bar_of_one_line_that_ends_as_a_line_of_text(tree, tmp_path, columns):
    text = on_a_terminal(tmp_path, columns)
    assert "3 of 3" in text and "━" in text and "images/s" in text and "MB/s" in text and " left" in text
    frames = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").splitlines()
    assert all(len(frame) <= columns for frame in frames if "━" in frame)
    assert [line.split(":")[0] for line in screen(text)] == ["train", "val"]


def test_a_terminal_that_cannot_draw_gets_plain_lines(tree, tmp_path):
    text = on_a_terminal(tmp_path, 80, TERM="dumb")
    assert "\x1b" not in text and [line.split(":")[0] for line in text.splitlines()] == ["train", "val"]


@pytest.mark.parametrize("failed, words", [(0, ""), (1234, ", 1,234 failed")])
@pytest.mark.parametrize("columns, speed", [(60, ""), (80, " 27 images/s, 3.0 MB/s")])
def test_the_bar_of_the_whole_of_imagenet_fits_a_terminal(monkeypatch, columns, speed, failed, words):
    from rich.console import Console

    monkeypatch.setattr("rich.get_console", lambda: Console(width=columns, force_terminal=True, file=io.StringIO()))
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    meter = Meter("train", 1_281_167, 146_000_000_000)
    meter.start -= 3700
    meter.advance(100_000, 11_000_000_000, failed)
    console = Console(width=columns, file=io.StringIO())
    console.print(meter._bar)
    [line] = console.file.getvalue().splitlines()
    assert line.startswith("train ") and line.endswith(f"  100,000 of 1,281,167{words}{speed} 12.6 h left")


def test_a_terminal_that_is_gone_is_not_taken_for_the_data_folder(monkeypatch):
    from rich.console import Console

    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("rich.progress.get_console", lambda: Console(width=80, force_terminal=True, file=Gone()))
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(OutputError, match="Input/output error"), Meter("train", 100, 1000):
        pass


def test_a_complete_folder_tells_the_images_that_it_holds_and_the_skipped_ones(tree, tmp_path, command):
    (tree / "train/ant/2.JPEG").write_text("no image")
    for _ in range(2):
        said = command("--source", "source", "--data_dir", "data", "--on_error", "skip").stdout
    words = "2 training and 2 validation images, 2 classes, 1 image skipped; --overwrite makes it again\n"
    assert said == f"data is complete: {words}"


def test_a_file_that_may_not_be_touched_is_named(command, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "data/manifest.json")

    monkeypatch.setattr("lbsgd.convert.convert.convert", refuse)
    done = command("--source", "source")
    words = "data/manifest.json: Permission denied; mend it, and the same command goes on"
    assert (done.returncode, done.stderr) == (2, f"error: {words}\n")


@pytest.mark.parametrize("name", ["train", "images.tar", "train-00000-of-00001"])
@pytest.mark.parametrize("flags", [(), ("--dry_run",)])
def test_a_source_that_may_not_be_read_is_not_the_data_folder_s_fault(command, name, flags):
    with tempfile.TemporaryDirectory() as place, as_nobody(place):
        locked = Path(place) / "locked"
        locked.mkdir()
        (locked / name).write_bytes(b"")
        locked.chmod(0)
        done = command("--source", f"{locked}/{name}", "--data_dir", f"{place}/data", *flags)
        locked.chmod(0o700)
        assert (done.returncode, done.stderr) == (2, f"error: cannot read {locked}/{name}: Permission denied\n")
        assert names_in(Path(place)) == ["locked"]


def test_a_file_elsewhere_that_fails_during_the_work_is_named_and_the_data_folder_is_not(tmp_path):
    for name, words in (
        ("source/table", "cannot use source/table: Permission denied; mend it, and the same command goes on"),
        (
            str(tmp_path / "made/data/x"),
            f"cannot write to {tmp_path}/made/data: Permission denied; name another folder",
        ),
        (str(tmp_path / "made"), f"cannot write to {tmp_path}/made/data: Permission denied; name another folder"),
    ):
        with pytest.raises(DataError, match=re.escape(words)), writing_to(tmp_path / "made/data"):
            raise PermissionError(errno.EACCES, "Permission denied", name)


def test_looking_says_what_a_conversion_would_refuse_or_find_complete(tree, tmp_path, command):
    def last(*flags):
        done = command("--source", "source", "--dry_run", *flags)
        assert done.returncode == 0 and done.stdout.startswith("found   source/train: 3 training images")
        return done.stdout.splitlines()[-1]

    command("--source", "source", "--data_dir", "data")
    (tmp_path / "file").write_text("")
    assert last("--data_dir", "data") == (
        "data is complete: 3 training and 2 validation images, 2 classes; --overwrite makes it again"
    )
    assert last("--data_dir", "data", "--overwrite").startswith("time ")
    assert last("--data_dir", "data", "--quality", "80").startswith(
        "refused: data already holds another data set: its manifest.json differs in quality; give --overwrite"
    )
    save(tree / "val/bee/new.JPEG")
    assert last("--data_dir", "data").startswith("refused: data already holds another data set: ")
    (tmp_path / "link").symlink_to("gone")
    for place in ("file", "file/data", "link"):
        told = f"cannot write to {place}: Not a directory; name another folder with --data_dir"
        assert last("--data_dir", place) == last("--data_dir", place, "--overwrite") == f"refused: {told}"
        assert command("--source", "source", "--data_dir", place).stderr == f"error: {told}\n"
    assert last("--data_dir", "other").startswith("time ")


def test_looking_says_that_a_folder_cannot_be_written_to(tree, command, monkeypatch):
    monkeypatch.setattr("lbsgd.convert.existing_data.os.access", lambda *_: False)
    said = command("--source", "source", "--data_dir", "new/data", "--dry_run").stdout
    told = "cannot write to new/data: Permission denied; name another folder with --data_dir"
    assert said.splitlines()[-1] == f"refused: {told}"


def locked(path, *_):
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


@pytest.mark.parametrize(
    "name, reader", [("train.beton", "data.beton.read_layout"), ("manifest.json", "data.folder.read_note")]
)
def test_data_that_may_not_be_read_are_not_made_again(tree, tmp_path, command, monkeypatch, name, reader):
    convert(tree, tmp_path / "data", **SETTINGS)
    before = names_in(tmp_path / "data")
    monkeypatch.setattr(f"lbsgd.{reader}", locked)
    done = command("--source", "source", "--data_dir", "data")
    assert (done.returncode, done.stderr) == (2, f"error: cannot read data/{name}: Permission denied\n")
    assert names_in(tmp_path / "data") == before


@pytest.mark.parametrize("name", ["identity.json", "manifest.json", "train.beton"])
def test_finished_work_that_may_not_be_read_is_kept(tree, tmp_path, command, monkeypatch, name):
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr("lbsgd.convert.convert.publish", lambda data_dir, work: {}[work])
        convert(tree, tmp_path / "data", **SETTINGS)
    work = tmp_path / "data" / ".converting"
    before = names_in(work)
    place = {"identity.json": "convert.work_folder.read_note", "manifest.json": "data.folder.read_note"}
    monkeypatch.setattr(f"lbsgd.{place.get(name, 'data.beton.read_layout')}", locked)
    done = command("--source", "source", "--data_dir", "data", "--max_side", str(SETTINGS.get("max_side", 500)))
    assert done.returncode == 2 and done.stderr == f"error: cannot read data/.converting/{name}: Permission denied\n"
    assert names_in(work) == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("flags", [("--source", "source"), ("--verify",)])
def test_memory_that_takes_no_lock_is_not_the_data_folder_s_fault(tree, tmp_path, command, monkeypatch, flags, code):
    if "--verify" in flags:
        convert(tree, tmp_path / "data", **SETTINGS)

    def full(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("multiprocessing.synchronize._multiprocessing.SemLock", full)
    done = command("--data_dir", "data", *flags)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: /dev/shm takes no lock of the processes ({os.strerror(code)}); make room")


@pytest.mark.parametrize("flags", [(), ("--verify",)])
@pytest.mark.parametrize("output", ["gone", "full"])
def test_an_output_that_takes_no_more_is_not_the_data_folder_s_fault(tree, tmp_path, flags, output):
    if flags:
        convert(tree, tmp_path / "data", **SETTINGS)
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "wb") as full:
        stdout = full if output == "full" else write
        command = [sys.executable, TOOL, "--source", "source", "--data_dir", "data", *flags]
        done = subprocess.run(command, cwd=tmp_path, stdout=stdout, stderr=subprocess.PIPE, text=True)
    os.close(write)
    reason = "Broken pipe" if output == "gone" else "No space left on device"
    assert (done.returncode, done.stderr) == (2, f"error: the output cannot be written ({reason})\n")


def test_looking_whose_reader_leaves_ends_in_silence(tree, tmp_path):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, TOOL, "--source", "source", "--data_dir", "data", "--dry_run"]
    done = subprocess.run(command, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
