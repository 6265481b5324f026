"""The rule about keys that only a later version of DeepSpeed reads: spelt right, but without effect."""

from __future__ import annotations

from collections.abc import Iterator

from lbsgd.config.checks.deepspeed_keys import lax_blocks, unread_at_the_top
from lbsgd.config.checks.rule import Hit, rule
from lbsgd.config.checks.subject import Document


@rule(
    "D87",
    "a key that only a later DeepSpeed reads",
    lbsgd="warning",
    plain="warning",
    why="DeepSpeed ignores a key that it does not know. Only a later version knows this one, and does what it asks "
    "for: before 0.17, for instance, torch_autocast leaves the network in float32.",
    fix="use a version that reads it, or delete it",
    example={"data_types": {"keep_in_fp32_modules": ["running_mean", "running_var"]}},
    version="0.18",
)
def key_to_come(json: Document) -> Iterator[Hit]:
    inside = [f"{name}.{key}" for name, unknown in lax_blocks(json) for key in unknown]
    for key in (*(key for key in unread_at_the_top(json) if "." not in key), *inside):
        if later := json.reader_to_come(key):
            said = (
                f"has no effect in DeepSpeed {json.accepted.version}, which ignores it: {later} is the first to read it"
            )
            yield Hit(key, said, f"use DeepSpeed {later} or newer, or delete it")
