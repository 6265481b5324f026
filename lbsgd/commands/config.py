"""`lbsgd config`: write a complete, checked DeepSpeed JSON for a global batch or another library, or the whole grid."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from lbsgd.algorithm.published import COCO_IMAGES, EPOCHS, IMAGENET_IMAGES
from lbsgd.commands.flag_types import add_settings, named, positive, require_alone
from lbsgd.commands.reader import reader_may_leave
from lbsgd.config.libraries.arguments import LIBRARIES
from lbsgd.config.precision import PRECISIONS
from lbsgd.disk import is_stream
from lbsgd.errors import ConfigError

if TYPE_CHECKING:
    from lbsgd.config.overrides import Overrides


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--global_batch", type=positive, metavar="KN", help="images per update, kn")
    add(
        "--from",
        type=named,
        dest="source",
        metavar="FILE",
        help="with --for, in place of --global_batch: start from this JSON; other flags change it",
    )
    needed = f"write the JSON that this library needs on --gpus N: {', '.join(LIBRARIES)}"
    add("--for", dest="library", choices=LIBRARIES, metavar="LIBRARY", help=needed)
    add("--parts", action="store_true", help="with --for: leave optimizer and schedule to lbsgd.parts_for in the code")
    add("--gpus", type=positive, metavar="N", help="choose the micro batch for N GPUs (default: one GPU per worker, k)")
    add("--micro_batch", type=positive, metavar="N", help="images per GPU and pass (default: its share, at most 256)")
    add("--precision", choices=PRECISIONS, help="(default: that of --from, else fp16, for a detector fp32)")
    add("--zero_stage", type=int, choices=(0, 1, 2), help="(default: that of --from, else 1 in fp16 and 0 otherwise)")
    add("--detection", action="store_true", help="Mask R-CNN on COCO, in place of a classifier on ImageNet")
    images = f"default: those of --from, else ImageNet's {IMAGENET_IMAGES}, for a detector COCO's {COCO_IMAGES}"
    add("--num_images", type=positive, metavar="N", help=f"training images ({images})")
    scaled = "without --from, warmup and decay scale with them unless given"
    epochs = f"{scaled} (default: those of --from, else {EPOCHS}; detectors are counted in iterations)"
    add("--epochs", type=positive, metavar="N", help=epochs)
    add_settings(command)
    add(
        "--output",
        type=named,
        metavar="FILE",
        help="write the JSON into this file, and keep an existing one as FILE.orig (default: print it)",
    )
    add("--all", type=named, metavar="DIR", help="write the paper's whole grid and its README into this folder instead")


@reader_may_leave()
def run(given: argparse.Namespace) -> int:
    """Write one JSON, or the grid. Warnings go to stderr, so that `> FILE` gets only the JSON."""
    if given.all:
        require_alone(given, "--all")
        return write_all(given.all)
    if given.source or given.library or given.parts:
        return for_library(given)
    if not given.global_batch:
        raise ConfigError("lbsgd config: say how many images an update takes, such as --global_batch 8192")
    return for_lbsgd(given)


def write_all(folder: str) -> int:
    """Write the paper's grid, without warnings: `lbsgd check` says what its comparisons cost."""
    from lbsgd.config.shipped import write_grid  # late: a wrong flag is reported before pydantic loads

    try:
        write_grid(Path(folder), generated)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from None
    print(f"{folder}: the paper's grid and its README.md")
    return 0


def for_lbsgd(given: argparse.Namespace) -> int:
    """Write a JSON for a global batch, with the warnings that `lbsgd check` would print."""
    from lbsgd.config.checks.inspection import findings_of

    config = config_of(given)
    print_beside(scaled_in(config, given))
    print_beside(f"warning: {finding}" for finding in findings_of(config) if finding.severity == "warning")
    if write_out(given.output, config):
        print(f"{given.output}: see what it means with `lbsgd plan {quote(str(given.output))} --gpus N`")
    return 0


def scaled_in(config: dict[str, Any], given: argparse.Namespace) -> list[str]:
    """Return a line that names the paper's numbers scaled to the run's length, if there are any."""
    from lbsgd.config.generate import scaled_epochs
    from lbsgd.config.keypath import get

    scaled = {} if given.detection else scaled_epochs(overrides_of(given))
    said = [f"{key} {value}" for key, value in scaled.items() if get(config, key) == value]
    return [f"scaled from the paper's {EPOCHS} epochs: {', '.join(said)}"] if said else []


def for_library(given: argparse.Namespace) -> int:
    """Write the JSON that a library needs to train one of ours, and print the library's own arguments.

    Changes and warnings follow the arguments as comments, so that all of it can be pasted.
    """
    from lbsgd.config.libraries.needs import needs_of
    from lbsgd.config.plan import Plan

    if not (given.source and given.library and given.gpus):
        raise ConfigError(
            "lbsgd config: give --from, --for and --gpus together, such as --from ds_configs/8k.json "
            "--for transformers --gpus 8"
        )
    if given.detection:
        raise ConfigError(
            "lbsgd config: --detection makes a new JSON: leave it out with --from, because the file says it"
        )
    plan = Plan.read(given.source, given.gpus, overrides=overrides_of(given))
    needs = needs_of(plan, given.library, given.parts)
    if write_out(given.output, needs.config):
        print(needs.text(given.output))
    else:
        print_beside([needs.text("FILE")])
    print_beside(f"# changed: {change}" for change in plan.changes)
    print_beside(f"# warning: {warning}" for warning in plan.warnings)
    return 0


def write_out(output: str | None, config: dict[str, Any]) -> bool:
    """Print a JSON, or write it into a file or a stream. Return whether it is in a file.

    Keep an existing file with other content next to it, as `lbsgd check --fix` does. Raises ConfigError if that file
    cannot be read, and so not be kept, or if the JSON cannot be written.
    """
    from lbsgd.config.json_file import format_json, keep_original, text_written, write_json

    if output is None:
        print(format_json(config))
        return False
    try:
        is_kept = os.path.isfile(output) and not is_stream(Path(output))
        before = Path(output).read_bytes() if is_kept else None
    except OSError as error:
        raise ConfigError(f"{output}: exists and cannot be read ({error.strerror}); choose another place") from None
    if before not in (None, text_written(config)):
        print_beside([f"# kept: the file as it was in {keep_original(output, before)}"])
    write_json(output, config)
    return not is_stream(Path(output))


def print_beside(lines: Iterable[str]) -> None:
    """Print lines on stderr, because stdout may hold the JSON."""
    for line in lines:
        print(line, file=sys.stderr)


def overrides_of(given: argparse.Namespace) -> Overrides:
    """Return the flags that change a JSON."""
    from lbsgd.config.overrides import Overrides

    return Overrides(
        global_batch=given.global_batch,
        micro_batch=given.micro_batch,
        precision=given.precision,
        settings=tuple(given.settings),
        zero_stage=given.zero_stage,
        epochs=given.epochs,
        num_images=given.num_images,
    )


def generated(arguments: list[str]) -> dict[str, Any]:
    """Return the JSON that `lbsgd config` makes of these arguments."""
    command = argparse.ArgumentParser(prog="lbsgd config")
    add_arguments(command)
    return config_of(command.parse_args(arguments))


def config_of(given: argparse.Namespace) -> dict[str, Any]:
    from lbsgd.config.generate import generate

    return generate(overrides_of(given), gpus=given.gpus, detection=given.detection)
