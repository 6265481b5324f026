"""Terminals that are not UTF-8 get plain letters, never a traceback."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lbsgd.commands.plain_letters import plain, print_plain_letters_where_needed

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "text, letters",
    [
        ("η = 0.1 · kn/256 → 3.2", "eta = 0.1 * kn/256 -> 3.2"),
        ("23.6 ± 0.1, −3", "23.6 +- 0.1, -3"),
        ("ΔΣ, ν τ λ ε ≈", "DeltaSigma, nu tau lambda eps ~"),
        ("10⁻³", "10-3"),
        ("Bücher, 東", "Bucher, ?"),
        ("▁▄█", "148"),
        ("plain", "plain"),
    ],
)
def test_letters_of_other_alphabets_have_names(text, letters):
    assert plain(text) == letters


def test_every_letter_that_the_code_prints_has_one():
    code = [path for folder in ("lbsgd", "tools", "recipes") for path in (ROOT / folder).rglob("*.py")]
    letters = {char for path in code for char in path.read_text(encoding="utf-8") if not char.isascii()}
    assert not {char for char in letters if "?" in plain(char)}


def stream(encoding):
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding)


@pytest.mark.parametrize(
    "encoding, written", [("ascii", b"eta * +-"), ("latin-1", b"eta \xb7 \xb1"), ("utf-8", "η · ±".encode())]
)
def test_only_what_an_encoding_lacks_is_replaced(monkeypatch, encoding, written):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream(encoding))
    print_plain_letters_where_needed()
    for each in (sys.stdout, sys.stderr):
        print("η · ±", end="", file=each, flush=True)
        assert each.buffer.getvalue() == written


@pytest.mark.parametrize(
    "encoding, errors, written",
    [
        ("utf-8", "strict", b"a\\udcff"),
        ("ascii", "strict", b"a?"),
        ("utf-8", "surrogateescape", b"a\xff"),
    ],
)
def test_a_name_of_a_file_that_is_no_utf_8_is_printed(monkeypatch, encoding, errors, written):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors))
    print_plain_letters_where_needed()
    for each in (sys.stdout, sys.stderr):
        print(os.fsdecode(b"a\xff"), end="", file=each, flush=True)
        assert each.buffer.getvalue() == written


def test_a_stream_of_someone_else_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    print_plain_letters_where_needed()
    print("η")
    assert sys.stdout.getvalue() == "η\n"


@pytest.mark.parametrize(
    "command",
    [
        "-m lbsgd plan ds_configs/8k.json --gpus 8",
        "recipes/resnet50.py --help",
    ],
)
def test_commands_print_in_ascii(command):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, env=environment, capture_output=True)
    printed = done.stdout.decode("ascii") + done.stderr.decode("ascii")
    assert done.returncode == 0 and "Traceback" not in printed, printed
    assert "plan" not in command or re.search(r"\beta\b", printed)
