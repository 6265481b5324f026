"""The rule about other files that are mistaken for a DeepSpeed JSON, such as accelerate's, a model's or npm's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lbsgd.config.checks.finding import Finding
from lbsgd.config.checks.recognise import is_meant_as_deepspeed_json
from lbsgd.config.checks.rule import Hit, findings_by, rule

OF_ACCELERATE = ("compute_environment", "distributed_type")  # top-level keys that `accelerate config` writes
ITS_DEEPSPEED_JSON = re.compile(r"""\bdeepspeed_config_file["']?\s*:\s*["']?([^\s"',}]+)""")


@dataclass(frozen=True)
class ForeignFile:
    """A file of another kind: its text, and whether it is accelerate's own configuration."""

    text: str
    is_accelerates: bool


@rule(
    "J03",
    "a file that is no DeepSpeed JSON",
    plain="error",
    why="None of its keys is DeepSpeed's, or few are. accelerate's own file has a block deepspeed_config, whose keys "
    "are accelerate's; its deepspeed_config_file names the DeepSpeed JSON, if there is one.",
    fix="name a DeepSpeed JSON",
    example='{"name": "my-project", "version": "1.0.0"}',
)
def no_deepspeed_json(file: ForeignFile) -> Iterator[Hit]:
    if not file.is_accelerates:
        yield Hit(
            "file",
            "is no DeepSpeed JSON: its keys are not DeepSpeed's",
            "name a DeepSpeed JSON such as ds_configs/8k.json",
        )
        return
    named = ITS_DEEPSPEED_JSON.search(file.text)
    said = "is accelerate's own configuration, and no DeepSpeed JSON"
    ours = "give a DeepSpeed JSON as deepspeed_config_file in its deepspeed_config block, and check that"
    yield Hit("file", said, f"check {named[1]}, which it names as deepspeed_config_file" if named else ours)


def foreign_findings(text: str, config: Mapping[str, Any] | None) -> tuple[Finding, ...]:
    """Return a finding if a file is not a DeepSpeed JSON. config is its JSON or Hjson, None if it is neither."""
    keys = re.findall(r"^(\w+):", text, re.MULTILINE) if config is None else config
    file = ForeignFile(text, any(key in keys for key in OF_ACCELERATE))
    is_ours = config is None or is_meant_as_deepspeed_json(config)
    return () if is_ours and not file.is_accelerates else tuple(findings_by([no_deepspeed_json], file, "plain"))
