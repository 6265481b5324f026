"""How the messages and versions of other packages are shown."""

import pytest

from lbsgd.errors import DataError, LostProcessError, one_line, print_error
from lbsgd.processes import peers as peers_module
from lbsgd.processes.environment import Processes
from lbsgd.units import installed, numbers


@pytest.mark.parametrize(
    "error, words",
    [
        (ValueError("the first line\nthe second"), "the first line"),
        (RuntimeError(), "RuntimeError"),
        (OSError("\nbehind an empty line"), "behind an empty line"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
    ],
)
def test_an_error_is_told_in_one_line_even_without_words(error, words):
    assert one_line(error) == words


def test_each_argument_of_an_error_is_a_line_whatever_a_name_holds(capsys):
    print_error(DataError("a\nerror: b.jpg is damaged", "c\u2028d is lost"))
    assert capsys.readouterr().err == "error: a?error: b.jpg is damaged\nerror: c?d is lost\n"
    assert str(DataError("first", "second")) == "first\nsecond"


def test_a_store_that_fails_without_words_is_a_lost_process(monkeypatch):
    def fails(*_):
        raise RuntimeError

    monkeypatch.setattr(peers_module, "meeting_point", lambda *_: None)
    monkeypatch.setattr(peers_module, "fresh_prefix", fails)
    with pytest.raises(LostProcessError, match=r"is gone \(RuntimeError\)"):
        peers_module.Peers.meet(Processes(1, 2, 1, 2), 10, lambda _: None)


@pytest.mark.parametrize("version, expected", [("2.11.0+cu130", (2, 11)), ("3.6", (3, 6)), (None, ())])
def test_versions_are_compared_by_their_first_two_numbers(version, expected):
    assert numbers(version) == expected


def test_a_package_that_is_not_there_has_no_version():
    assert installed("torch") and installed("lbsgd-of-another-name") is None
