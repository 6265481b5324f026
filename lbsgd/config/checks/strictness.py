"""Rules about the file itself: whether it is strict JSON, which every tool reads alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lbsgd.config.checks.rule import Hit, rule


@dataclass(frozen=True)
class UnstrictFile:
    """A file that is no strict JSON: why not, and whether DeepSpeed, which reads Hjson, can read it all the same."""

    reason: str
    readable: bool

    @property
    def problem(self) -> str:
        """The reason as a message says it: a file that cannot be opened may well be JSON."""
        return self.reason if self.reason.startswith("cannot be read") else f"is no strict JSON: {self.reason}"


@rule(
    "J01",
    "a file that cannot be read",
    lbsgd="error",
    plain="error",
    why="The file is missing, or it is no JSON object, or a key stands there twice, so nobody can say which value "
    "counts. A file with an lbsgd block must be strict JSON: its numbers are written back by program.",
    fix="correct it",
    example='{"train_batch_size": 256, "train_batch_size": 512}',
)
def unreadable(file: UnstrictFile) -> Iterator[Hit]:
    if not file.readable:
        yield Hit("file", file.problem)


@rule(
    "J02",
    "a file that only DeepSpeed reads",
    plain="warning",
    why="DeepSpeed reads Hjson, with comments and without commas. Most other tools, Hugging Face's among them, "
    "read strict JSON only.",
    fix="correct it",
    example='{"train_batch_size": 256, # images\n "gradient_clipping": 0.0,\n '
    '"timers": {"throughput": {"enabled": false}}}',
)
def hjson(file: UnstrictFile) -> Iterator[Hit]:
    if file.readable:
        yield Hit("file", f"is no strict JSON, which DeepSpeed reads and most other tools do not: {file.reason}")


RULES = (unreadable, hjson)
