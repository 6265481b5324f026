"""What the commands print on a terminal: in its width, in one unit, in the letters that it has; and what in a pipe."""

import re
from pathlib import Path

import pytest

from lbsgd.commands.main import main
from lbsgd.commands.plan_screen import span

ROOT = Path(__file__).parent.parent
EIGHT_K = str(ROOT / "ds_configs/8k.json")


@pytest.fixture
def on_terminal(monkeypatch, capsys):
    """Return a function that runs a command as on a terminal of some columns, and returns its lines without colours."""

    def run(columns, *arguments):
        monkeypatch.setattr("lbsgd.report.printer.on_terminal", lambda: True)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", "xterm")
        assert main([*map(str, arguments)]) == 0
        return re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()

    return run


# --- plan -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [60, 80, 160])
@pytest.mark.parametrize(
    "arguments",
    [
        ["8k.json"],
        ["8k.json", "--set", "lbsgd.warmup.epochs=2", "--images_per_second", "2500", "--gpus_per_server", "4"],
        ["8k_fp32.json", "--gpus", "8"],
        ["64k.json"],
        ["detection/mask_rcnn_16.json"],
        ["digits.json", "--model", "resnet18"],
    ],
)
def test_a_plan_fits_the_terminal_and_says_what_it_says_in_a_pipe(capsys, on_terminal, columns, arguments):
    command = ["plan", str(ROOT / "ds_configs" / arguments[0]), *arguments[1:]]
    assert main(command) == 0
    piped = capsys.readouterr().out
    lines = on_terminal(columns, *command)
    assert max(map(len, lines)) <= columns, max(lines, key=len)

    def words(text):
        return set(re.findall(r"[\w.,%]+", re.sub("[─▁-█]+", "", re.sub(r"(?m)^ *[\d.]+ ┤.*|.* epochs$", "", text))))

    assert words(piped) - words("\n".join(lines)) <= {"activations"}  # which a narrow table divides


def test_in_a_pipe_each_fact_of_a_plan_is_one_line_whatever_the_width(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["plan", EIGHT_K]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  reduced: 51 MB of gradients in 5 buckets, then 51 MB of weights gathered; 153 MB leave each GPU" in lines


@pytest.mark.parametrize(
    "shortest, longest, words",
    [
        (3486, 4400, "0.97 to 1.22 h"),
        (40, 90, "0.7 to 1.5 min"),
        (40, 59.5, "40.0 to 59.5 s"),
        (0.1, 0.2, "0.1 to 0.2 s"),
        (7200, 7201, "2.00 h"),
    ],
)
def test_a_span_of_times_has_one_unit(shortest, longest, words):
    assert span(shortest, longest) == words
