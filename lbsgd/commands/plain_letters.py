"""Output for terminals and files that are not UTF-8: plain letters instead of a UnicodeEncodeError."""

from __future__ import annotations

import codecs
import re
import sys
import unicodedata

NAME = "lbsgd.plain_letters"  # of the error handler in codecs

WORDS = {
    **dict(zip("ελµ√∑∏∇", "eps lambda u sqrt sum prod grad".split(), strict=True)),
    **dict(zip("·×−–—±≈≤≥→←", "* x - - - +- ~ <= >= -> <-".split(), strict=True)),
    **dict(zip("§…‘’“”⌊⌋⌈⌉", ["Sec.", "...", *"''", *'""', *"[][]"], strict=True)),
    **dict(zip("▁▂▃▄▅▆▇█", "12345678", strict=True)),  # the bars of a small plot, by height
    **dict(zip("─│┤├└┌┐┘", "-|||++++", strict=True)),
}
GREEK = re.compile(r"GREEK (SMALL|CAPITAL) LETTER (\w+)")  # Unicode's names


def plain(text: str) -> str:
    """Return the text in ASCII: Greek letters by name, other letters without accents, and ? for the rest."""
    return "".join(char if char.isascii() else WORDS.get(char) or _spelled(char) for char in text)


def _spelled(char: str) -> str:
    if greek := GREEK.match(unicodedata.name(char, "")):
        size, name = greek.groups()
        return name.lower() if size == "SMALL" else name.capitalize()
    return _without_accents(char)


def _without_accents(char: str) -> str:
    decomposed = unicodedata.normalize("NFKD", char)
    if unicodedata.combining(decomposed[0]):
        return ""
    letters = "".join(WORDS.get(part, part) for part in decomposed)
    return letters.encode("ascii", "ignore").decode() or "?"


def print_plain_letters_where_needed() -> None:
    """Make stdout and stderr write plain letters for characters that their encoding lacks.

    UTF-8 lacks only the bytes of file names that are not UTF-8, which are written as escapes.
    """
    codecs.register_error(NAME, _replace)
    for stream in (sys.stdout, sys.stderr):
        if not hasattr(stream, "reconfigure"):
            continue  # other streams, as in a notebook, take any text
        if not (stream.encoding or "").lower().startswith("utf"):
            stream.reconfigure(errors=NAME)
        elif stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return plain(error.object[error.start : error.end]), error.end
