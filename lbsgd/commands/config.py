"""`lbsgd config`: write a complete, checked DeepSpeed JSON for a global batch, or the paper's whole grid of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lbsgd.algorithm.published import COCO_IMAGES, EPOCHS, IMAGENET_IMAGES
from lbsgd.commands.flag_types import PRECISIONS, add_settings, positive
from lbsgd.errors import ConfigError


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--global_batch", type=positive, metavar="KN", help="images per update, kn")
    add("--gpus", type=positive, metavar="N", help="choose the micro batch for N GPUs (default: one GPU per worker, k)")
    add("--micro_batch", type=positive, metavar="N", help="images per GPU and pass (default: its share, at most 256)")
    add("--precision", choices=PRECISIONS, help="(default: fp16, of a detector fp32)")
    add("--zero_stage", type=int, choices=(0, 1, 2), help="(default: 1 in fp16, else 0)")
    add("--detection", action="store_true", help="Mask R-CNN on COCO, in place of a classifier on ImageNet")
    images = f"training images (default: ImageNet's {IMAGENET_IMAGES}, of a detector COCO's {COCO_IMAGES})"
    add("--num_images", type=positive, metavar="N", help=images)
    add("--epochs", type=positive, metavar="N", help=f"(default: {EPOCHS}; detectors are counted in iterations)")
    add_settings(command)
    add("--output", metavar="FILE", help="write the JSON into this file (default: print it)")
    add("--all", metavar="DIR", help="instead, write the paper's whole grid and its README into a folder")


def run(given: argparse.Namespace) -> int:
    from lbsgd.config.json_file import format_json, write_json  # late: a wrong flag is reported before pydantic loads

    if given.all:
        from lbsgd.config.shipped import write_grid

        write_grid(Path(given.all), generated)
        print(f"{given.all}: the paper's grid and its README.md")
        return 0
    if not given.global_batch:
        raise ConfigError("lbsgd config: say how many images an update takes, such as --global_batch 8192")
    config = config_of(given)
    if given.output:
        write_json(given.output, config)
        print(f"{given.output}: see what it means with `lbsgd plan {given.output} --gpus N`")
    else:
        print(format_json(config))
    return 0


def generated(arguments: list[str]) -> dict[str, Any]:
    """Return the JSON that `lbsgd config` makes of these arguments."""
    command = argparse.ArgumentParser(prog="lbsgd config")
    add_arguments(command)
    return config_of(command.parse_args(arguments))


def config_of(given: argparse.Namespace) -> dict[str, Any]:
    from lbsgd.config.generate import generate

    return generate(
        given.global_batch,
        gpus=given.gpus,
        micro_batch=given.micro_batch,
        precision=given.precision,
        zero_stage=given.zero_stage,
        num_images=given.num_images,
        epochs=given.epochs,
        settings=tuple(given.settings),
        detection=given.detection,
    )
