"""Rules about the file itself: whether it is strict JSON, which all tools read alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lbsgd.config.checks.rule import Hit, rule


@dataclass(frozen=True)
class UnstrictFile:
    """A file that is not strict JSON: the reason, what to do, and whether DeepSpeed can read it as Hjson."""

    problem: str
    fix: str
    readable: bool


@rule(
    "J01",
    "a file that cannot be read",
    lbsgd="error",
    plain="error",
    why="The file is missing, is not a JSON object, or has a key twice, so that nobody can say which value counts. A "
    "file with an lbsgd block must be strict JSON, because lbsgd writes its numbers back.",
    fix="correct it",
    example='{"train_batch_size": 256, "train_batch_size": 512}',
)
def unreadable(file: UnstrictFile) -> Iterator[Hit]:
    if not file.readable:
        yield Hit("file", file.problem, file.fix)


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
        yield Hit("file", f"{file.problem}: DeepSpeed reads it, and most other tools do not", file.fix)
