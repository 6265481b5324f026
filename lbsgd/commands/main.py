"""The command `lbsgd`, also `python -m lbsgd`: plan, check, config and report. Imports neither torch nor deepspeed.

lbsgd plan FILE --gpus 256          what a JSON means on so many GPUs, and how long it would take
lbsgd check FILE [FILE ...]         what is wrong in a DeepSpeed JSON, why it hurts, and the fix
lbsgd config --global_batch KN      a complete JSON for a global batch
lbsgd report RUN [RUN ...]          table and curves of runs
lbsgd reproduce EXPERIMENT DATA     runs a table or figure of the paper, and reports it
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lbsgd.commands.reproduce import reproduce_arguments, run_reproduce
from lbsgd.errors import ConfigError, LbsgdError, print_error


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; its exit code: 0 done, 1 `check` found errors, 2 something given is wrong (one line says what)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["report"]:  # it has a parser of its own
        from lbsgd.report.curves import main as report

        return report(arguments[1:])
    given = parser().parse_args(arguments)
    try:
        return given.run(given)
    except LbsgdError as error:
        print_error(error)
        return error.exit_code
    except BrokenPipeError:  # `lbsgd plan ... | head`
        sys.stderr.close()
        return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="lbsgd", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    for name, arguments, run, summary in (
        ("plan", plan_arguments, run_plan, "what a JSON means on so many GPUs, and how long it would take"),
        ("check", check_arguments, run_check, "what is wrong in DeepSpeed JSONs, why it hurts, and the fix"),
        ("config", config_arguments, run_config, "a complete JSON for a global batch"),
        ("report", lambda command: None, None, "table and curves of runs"),
        ("reproduce", reproduce_arguments, run_reproduce, "runs a table or figure of the paper, and reports it"),
    ):
        command = commands.add_parser(name, help=summary, description=summary)
        arguments(command)
        command.set_defaults(run=run)
    return top


def positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 10**12:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def quantity(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def add_settings(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="KEY=VALUE",
        help="put a value at a key path, such as lbsgd.warmup.epochs=2; what depends on it is derived again",
    )


# --- config -------------------------------------------------------------------------------------------------------------


def config_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--global_batch", type=positive, metavar="KN", help="images an update, kn")
    add(
        "--gpus", type=positive, metavar="N", help="choose the micro batch for so many GPUs (default: k, a worker each)"
    )
    add(
        "--micro_batch",
        type=positive,
        metavar="N",
        help="images a GPU takes in one pass (default: its share, at most 256)",
    )
    add("--precision", choices=("fp16", "bf16", "fp32"), default="fp16", help="(default: %(default)s)")
    add("--zero_stage", type=int, choices=(0, 1, 2), help="(default: 1 in fp16, else 0)")
    add(
        "--num_images",
        type=positive,
        default=1_281_167,
        metavar="N",
        help="training images (default: ImageNet's %(default)s)",
    )
    add("--epochs", type=positive, default=90, metavar="N", help="(default: %(default)s)")
    add_settings(command)
    add("--output", metavar="FILE", help="write it there (default: print it)")
    add("--all", metavar="DIR", help="write the paper's whole grid and its README into a folder instead")


def run_config(given: argparse.Namespace) -> int:
    from lbsgd.config.json_file import format_json, write_json

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
    """The JSON that `lbsgd config` makes of these arguments."""
    return config_of(parser().parse_args(["config", *arguments]))


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
    )


# --- check --------------------------------------------------------------------------------------------------------------


def check_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    command.epilog = "Exit code 0: no errors (warnings may be there); 1: errors; 2: something given is wrong."
    add("files", nargs="+", metavar="FILE", help="DeepSpeed JSONs, with or without an lbsgd block, or folders of them")
    add("--json", action="store_true", help="findings as JSON, for machines")
    add("--fix", action="store_true", help="write what can be corrected back into the file, and say what changed")


def run_check(given: argparse.Namespace) -> int:
    from lbsgd.config.checks.inspect import check_files

    return check_files(given.files, as_json=given.json, fix=given.fix)


# --- plan ---------------------------------------------------------------------------------------------------------------


def plan_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("file", metavar="FILE", help="a DeepSpeed JSON with an lbsgd block, such as ds_configs/8k.json")
    add("--gpus", type=positive, metavar="N", help="(default: as many as take kn in one pass)")
    add("--images", type=positive, metavar="N", help="training images (default: the JSON's)")
    add("--global_batch", type=positive, metavar="KN", help="instead of the JSON's")
    add("--micro_batch", type=positive, metavar="N", help="instead of the JSON's")
    add_settings(command)
    add("--model", default="resnet50", help="for memory and bytes (default: %(default)s)")
    add("--png", metavar="FILE", help="draw the schedule")
    add("--json", action="store_true", help="everything as JSON, for machines")
    speed = command.add_argument_group("for the prediction; the defaults are the paper's machines")
    speed.add_argument(
        "--images_per_second",
        type=quantity,
        metavar="X",
        help="one GPU inside its server (default: a P100's 138, from 29 h on 8)",
    )
    speed.add_argument("--gpus_per_server", type=positive, default=8, metavar="N", help="(default: %(default)s)")
    speed.add_argument(
        "--link_gbit", type=quantity, default=50.0, metavar="X", help="between servers (default: %(default)g)"
    )
    speed.add_argument(
        "--latency_us",
        type=quantity,
        default=20.0,
        metavar="X",
        help="of one message between servers, an assumption (default: %(default)g)",
    )


def run_plan(given: argparse.Namespace) -> int:
    from lbsgd.commands.plan import show

    return show(given)
