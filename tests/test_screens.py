"""What the commands print: on a terminal, in its width and its letters; and into a pipe."""

import io
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lbsgd.commands.check_screen import lines_of
from lbsgd.commands.main import main
from lbsgd.commands.plain_letters import print_plain_letters_where_needed
from lbsgd.commands.plan_screen import span
from lbsgd.config.checks.explain import explain_all
from lbsgd.config.checks.inspection import inspect
from lbsgd.experiments.overview import Overview
from lbsgd.report.lines import on_width
from lbsgd.report.paper_table import WIDE, Columns, PaperTable
from lbsgd.report.printer import Printer

ROOT = Path(__file__).parent.parent
EIGHT_K = str(ROOT / "ds_configs/8k.json")


@pytest.fixture
def on_terminal(monkeypatch, capsys):
    """Return a function that runs a command as on a terminal of this width, and returns its lines without colours."""

    def run(columns, *arguments):
        monkeypatch.setattr("lbsgd.report.printer.on_terminal", lambda: True)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", "xterm")
        assert main([*map(str, arguments)]) == 0
        return re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()

    return run


# --- plan -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [40, 50, 60, 80, 160])
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
    long = [line for line in lines if len(line) > columns]
    assert not long or columns < 60 and all(len(line.split()) == 1 for line in long), long  # a key is not broken

    def words(text):
        return set(re.findall(r"[\w.,%]+", re.sub("[─▁-█]+", "", re.sub(r"(?m)^ *[\d.]+ ┤.*|.* epochs$", "", text))))

    assert words(piped) - words("\n".join(lines)) <= {"activations"}  # a narrow table hyphenates it


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
        (7.2e6, 3.6e7, "2,000.00 to 10,000.00 h"),
    ],
)
def test_a_span_of_times_has_one_unit(shortest, longest, words):
    assert span(shortest, longest) == words


def test_a_table_that_no_terminal_column_holds_is_a_list(on_terminal):
    lines = on_terminal(50, "plan", EIGHT_K, "--gpus", "256")
    ring = lines.index("   ring")
    assert lines[ring + 1 : ring + 5] == [
        "     aggregation      35.3 ms",
        "     without overlap  267.1 ms",
        "     with overlap     249.4 ms",
        "     efficiency       86.8% to 92.9%",
    ]


# --- check, and the start of a recipe ---------------------------------------------------------------------------------


def test_the_head_of_a_checked_file_breaks_between_its_parts():
    found = inspect(str(ROOT / "tests/fixtures/foreign/misspelt.json"), version="0.19")
    lines = ["".join(text for text, _ in line) for line in lines_of(found, 50)]
    assert lines[1:3] == ["    (plain DeepSpeed 0.19.8: no lbsgd block)", "    1 error, 6 warnings, 2 notes"]
    assert max(map(len, lines[1:])) <= 50
    words = " ".join(lines).split()
    assert set(" ".join("".join(text for text, _ in line) for line in lines_of(found, None)).split()) <= set(words)


@pytest.mark.parametrize("width", [50, 80, 100, 1000])
def test_a_code_is_explained_in_the_terminals_width(width):
    text = explain_all(width)
    assert text.split() == explain_all().split()
    assert max(map(len, text.splitlines())) <= min(width, 100)


def test_a_fact_of_a_recipe_breaks_between_words(monkeypatch):
    monkeypatch.setenv("COLUMNS", "36")
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: True))
    assert on_width(f"{'warmup':15}gradual, W = 780 iterations", 15).splitlines() == [
        "warmup         gradual, W = 780",
        "               iterations",
    ]
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: False))
    assert on_width("x " * 40) == "x " * 40


# --- reproduce and report ---------------------------------------------------------------------------------------------


@pytest.fixture
def finished_grid(tmp_path):
    """The command that reports the published runs of table1 again, from a copy."""
    for row in ("x1", "x8", "x8_no_warmup", "x8_constant_warmup"):
        shutil.copytree(ROOT / "results/digits/runs" / row, tmp_path / "results/digits/runs" / row)
    shutil.copy(ROOT / "results/digits/grid.json", tmp_path / "results/digits")
    return ["reproduce", "table1", "digits", "--work_dir", str(tmp_path), "--results", str(tmp_path / "results")]


def test_reproduce_prints_tables_on_a_terminal_and_markdown_in_a_pipe(finished_grid, on_terminal, monkeypatch, capsys):
    monkeypatch.setattr(
        "lbsgd.experiments.reproduce.write_report", lambda _, folder, *more: folder.mkdir(exist_ok=True)
    )
    for columns in (60, 80, 160):
        lines = on_terminal(columns, *finished_grid)
        printed = "\n".join(lines)
        tables = lines[[line.strip() for line in lines].index("Table 1, warmup") :]
        assert max(len(line) for line in tables if "/" not in line) <= columns  # except paths
        assert "| ---" not in printed and "**" not in printed
        assert "gradual warmup" in printed if columns > 60 else "no warmup" in printed
        assert "Claims, stated before the runs" in printed and re.search(r"yes +\+0.23 \[-0.24, \+0.70\]", printed)
        assert ("x8_no_warmup - x1" in printed) == (columns == 160)
    monkeypatch.setattr("lbsgd.report.printer.on_terminal", lambda: False)
    assert main(finished_grid) == 0
    assert "| gradual warmup | 8,192 | 3.2 | 23.74 ± 0.09 | 256 | 1.6 | 1.07 ± 0.32 |" in capsys.readouterr().out


def test_a_full_disk_behind_the_output_of_reproduce_is_not_the_grid_s(finished_grid):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "lbsgd", *finished_grid]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "error: the output cannot be written (No space left on device)\n")


def table_of(*labels):
    columns = Columns(("", "kn", "η", "error %", "kn"), (0, 3, 4), "ImageNet")
    rows = tuple((label, "256", "0.1", "23.60 ± 0.12", "32") for label in labels)
    return PaperTable("table1", "Warmup", "digits", columns, rows, ())


def test_columns_stand_where_the_letters_of_an_ascii_terminal_put_them(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    print_plain_letters_where_needed()
    Printer(160).print(table_of("γ = 1", "baseline").rich(160))
    sys.stdout.flush()
    *_, first, second = sys.stdout.buffer.getvalue().decode("ascii").splitlines()
    assert first.startswith("gamma = 1") and "23.60 +- 0.12" in first
    assert [at for at, letter in enumerate(first) if letter == "|"] == [
        at for at, letter in enumerate(second) if letter == "|"
    ]


@pytest.mark.parametrize("width, shown", [(WIDE, [0, 1, 2, 3, 4]), (WIDE - 1, [0, 3, 4])])
def test_the_heads_of_a_table_say_whose_numbers_they_are_whatever_its_width(width, shown):
    heads = ["", "paper\nkn", "paper\nη", "paper\nerror %", "ours\nkn"]
    assert [column.header for column in table_of("baseline").rich(width).columns] == [heads[at] for at in shown]


def test_a_pipe_is_no_terminal_where_colours_are_forced(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as build servers do
    Printer(160).print("[bold red]words")
    assert capsys.readouterr().out == "words\n"
    assert Overview([], tmp_path, lambda job: 1).live is None


def test_a_label_in_brackets_is_no_markup(capsys):
    Printer(160).print(table_of("from [/data]").rich(160))
    assert "from [/data]" in capsys.readouterr().out


@pytest.mark.parametrize("columns", [40, 50, 60, 80, 160])
def test_a_table_of_runs_keeps_their_names_whole(on_terminal, columns):
    lines = on_terminal(columns, "report", ROOT / "results/digits/runs/x1", ROOT / "results/digits/runs/x8")
    assert max(map(len, lines)) <= columns
    assert [line.split()[0] for line in lines if "/seed" in line] == [f"x{k}/seed{n}" for k in (1, 8) for n in range(5)]
