"""The progress of a run as a person sees it, on a terminal and in a file."""

import io
import subprocess
import sys

import pytest
from rich.console import Console

from lbsgd.report.measure import CLASSIFIER
from lbsgd.train import progress as module
from lbsgd.train.progress import Progress, Screen


def iteration(t, **more):
    return {
        "iteration": t,
        "epoch": t / 11,
        "lr": 0.2,
        "train_loss": 0.5123,
        "images_per_second": 163.4,
        "data_wait_pct": 0.4,
        **more,
    }


EPOCH = {"epoch": 3, "train_loss": 0.4567, "train_top1_error_pct": 12.345, "val_top1_error_pct": 9.8, "seconds": 8.1}


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until the test moves it: clock[0] is the time in seconds."""
    now = [0.0]
    monkeypatch.setattr(module, "perf_counter", lambda: now[0])
    return now


def terminal(width=80):
    return Console(force_terminal=True, force_interactive=True, width=width, height=24, file=io.StringIO(), record=True)


def screen(progress):
    """Return the lines at the bottom of the terminal as drawn."""
    progress.console.print(progress._screen())
    return progress.console.export_text().splitlines()


def test_a_file_gets_one_line_for_each_record(capsys, clock):
    with Progress(165, 11) as progress:
        for _ in range(22):
            clock[0] += 2.0
            progress.advance()
        progress.iteration(iteration(21))
        progress.epoch(EPOCH)
        progress.say("done: [runs/digits]")
    assert capsys.readouterr().out.splitlines() == [
        # 143 iterations are left, at 2 s each
        "epoch  2/15  iteration  22/165  lr 0.20000  loss 0.5123    163 images/s  waiting  0.4 %  left 4:46",
        "epoch  3/15  error: train 12.35 %  val  9.80 %  loss 0.4567  took 0:08",
        "done: [runs/digits]",
    ]


def test_a_line_moves_no_cursor_whatever_a_file_is_called(capsys):
    with Progress(165, 11) as progress:
        progress.say("data/\x1b[2J")
    assert capsys.readouterr().out == "data/?[2J\n"


def test_a_file_stays_plain_though_force_color_is_set(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress(165, 11) as progress:
        progress.iteration(iteration(0))
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "\x1b" not in out


def test_lines_are_aligned_from_the_first_iteration_to_the_last(capsys, clock):
    with Progress(165, 11) as progress:
        progress.iteration(iteration(0, images_per_second=9.0, data_wait_pct=99.9))
        progress.iteration(iteration(164, images_per_second=12345.0))
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("epoch  1/15  iteration   1/165") and last.startswith("epoch 15/15  iteration 165/165")
    for word in ("iteration", "lr", "loss", "images/s", "waiting", "left"):
        assert first.index(word) == last.index(word)


def test_what_the_log_holds_as_null_is_shown_as_a_dash(capsys):
    with Progress(165, 11) as progress:
        progress.iteration(iteration(0, train_loss=None, images_per_second=None, data_wait_pct=None))
    assert "loss -  - images/s  waiting - %" in capsys.readouterr().out


def test_what_training_does_not_count_is_left_out_of_an_epoch_s_line(capsys):
    with Progress(10, 5, judged_by=CLASSIFIER) as progress:
        progress.epoch(
            {"epoch": 1, "train_loss": 2.0, "val_top1_error_pct": 40.0, "seconds": 1, "images_per_second": 9}
        )
    assert "error 40.00 %" in capsys.readouterr().out


def test_time_left_is_that_of_the_whole_run_and_leaves_the_slow_first_iteration_out(clock):
    progress = Progress(total_iterations=100, iterations_per_epoch=10, console=terminal())
    clock[0] = 60.0  # the first iteration warms everything up
    progress.advance()
    assert progress._left() == "left -"
    clock[0] = 63.0
    progress.advance(3)  # 1 s each, with 96 left
    assert progress._left() == "left 1:36"
    clock[0] = 1000.0  # time passes within an iteration, so nothing new is known
    assert progress._left() == "left 1:36"


def test_a_resumed_run_is_timed_from_where_it_goes_on(clock):
    progress = Progress(total_iterations=14040, iterations_per_epoch=156, console=terminal())
    progress.begin(7020)
    for clock[0] in (10.0, 12.0):
        progress.advance()
    assert progress._left() == "left 3:53:56"  # 7,018 iterations at 2 s
    assert screen(progress)[0].startswith("epoch 46/90 ") and " 7022/14040 " in screen(progress)[0]


def test_a_run_that_has_done_more_than_is_asked_for_says_so(capsys):
    progress = Progress(22, 11)
    progress.begin(33)
    progress.epoch(EPOCH)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "done before    33 iterations (3 epochs), and this command asks for 22, so it trains no more"
    assert second.startswith("epoch 3/3 ")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_terminal_shows_two_lines_and_wraps_none(clock, width):
    progress = Progress(14040, 156, console=terminal(width))
    progress.begin(7000)
    for clock[0] in (0.0, 6.0):
        progress.advance()
    progress.iteration(iteration(7001, lr=25.6, train_loss=6.9078, images_per_second=123456.0, data_wait_pct=100.0))
    lines = screen(progress)
    assert len(lines) == 2 and all(len(line) <= width for line in lines)
    assert lines[0].startswith("epoch 45/90  ━") and lines[0].endswith("━  iteration  7002/14040  left 11:43:48")
    assert lines[1].rstrip() == "lr 25.60000  loss 6.9078  123456 images/s  waiting 100.0 %"


def test_a_narrow_terminal_loses_words_but_keeps_its_two_lines():
    progress = Progress(14040, 156, console=terminal(40))
    progress.iteration(iteration(0))
    assert [len(line) for line in screen(progress)] == [40, 40]


def test_the_last_iteration_is_still_one_of_the_last_epoch():
    progress = Progress(165, 11, console=terminal())
    progress.begin(154)
    assert screen(progress)[0].startswith("epoch 15/15 ")
    progress.advance(11)
    assert screen(progress)[0].startswith("epoch 15/15 ") and " 165/165 " in screen(progress)[0]


@pytest.mark.parametrize("done", [25, 50, 75])
def test_the_bar_is_as_long_as_the_share_that_is_done(done):
    progress = Progress(100, 10, console=terminal(160))
    progress.advance(done)
    line = screen(progress)[0]
    bar = line[line.index("━") : line.rindex("━") + 1]
    joint = min(bar.index(mark) for mark in "╺╸" if mark in bar)
    assert joint / len(bar) == pytest.approx(done / 100, abs=0.01)


def test_on_a_terminal_epochs_and_words_stay_above_the_bar():
    console = terminal()
    with Progress(165, 11, console=console) as progress:
        progress.say("[bold]as it is[/bold]")
        progress.advance()
        progress.iteration(iteration(0))
        progress.epoch(EPOCH)
    lines = console.export_text().splitlines()
    assert "[bold]as it is[/bold]" in lines
    assert "epoch  3/15  error: train 12.35 %  val  9.80 %  loss 0.4567  took 0:08" in lines


def test_the_longest_epoch_line_fits_on_a_terminal():
    console = terminal()
    slow = {
        "epoch": 90,
        "train_loss": 6.9078,
        "train_top1_error_pct": 100.0,
        "val_top1_error_pct": 100.0,
        "seconds": 99_999,
    }
    Progress(14040, 156, console=console).epoch(slow)
    (line,) = console.export_text().splitlines()
    assert line == "epoch 90/90  error: train 100.00 %  val 100.00 %  loss 6.9078  took 27:46:39" and len(line) <= 80


def test_a_full_disk_under_the_console_ends_no_training():
    with open("/dev/full", "w") as full:
        for _ in range(2):
            Progress(10, 5, console=Screen(file=full)).say("a line")
        full.close = lambda: None  # it cannot be flushed


def test_a_console_whose_reader_is_gone_ends_no_training():
    code = """
from lbsgd.train.progress import Progress
progress = Progress(10, 5)
progress.say("first")
input()
for _ in range(3):
    progress.say("not read by anybody")
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"first\n"
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(60) == 0


def test_an_error_inside_gives_the_terminal_back():
    console = terminal()
    with pytest.raises(RuntimeError):
        with Progress(165, 11, console=console) as progress:
            progress.advance()
            raise RuntimeError
    hidden, shown = (console.file.getvalue().rindex(code) for code in ("\x1b[?25l", "\x1b[?25h"))  # the cursor
    assert shown > hidden


def test_advance_is_cheap():
    progress = Progress(10**6, 100, console=terminal())
    start = module.perf_counter()
    for _ in range(10_000):
        progress.advance()
    assert (module.perf_counter() - start) / 10_000 < 20e-6  # measured: 0.3 µs; an iteration takes milliseconds


def test_the_speed_on_a_terminal_leaves_the_evaluation_out(clock):
    progress = Progress(100, 4, images_per_iteration=10, console=terminal())
    progress.iteration(iteration(0, images_per_second=33.0))
    speeds = []
    for seconds in (1, 1, 1, 1000, 1):  # an evaluation before the fourth
        if seconds == 1000:
            progress.epoch(EPOCH)
        clock[0] += seconds
        progress.advance()
        speeds.append(screen(progress)[-1].split("images/s")[0].split()[-1])
    assert speeds == ["33", "10", "10", "33", "10"]  # the last record's, until two iterations are known
