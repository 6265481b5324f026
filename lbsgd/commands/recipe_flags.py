"""The flags of a recipe."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from lbsgd.commands.flag_types import (
    OneLineParser,
    TakesFlags,
    add_settings,
    interval,
    named,
    natural,
    positive,
    seconds,
)
from lbsgd.config.precision import PRECISIONS
from lbsgd.errors import ConfigError

if TYPE_CHECKING:
    from lbsgd.config.overrides import Overrides


class RecipeParser(OneLineParser):
    """A parser whose refusals are told like every error before the processes meet: once per host, and to the others."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists the flags")


def parser(description: str) -> argparse.ArgumentParser:
    """Return the parser of a classifier's flags."""
    return with_flags(description, add_data)


def with_flags(description: str, add_data: Callable[[argparse.ArgumentParser], None]) -> argparse.ArgumentParser:
    """Return the parser of the flags of every recipe, and of the recipe's data."""
    flags = RecipeParser(description=description)
    flags.add_argument(
        "--deepspeed_config", type=named, required=True, metavar="JSON", help="the recipe, such as ds_configs/8k.json"
    )
    flags.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it, as LOCAL_RANK
    add_data(flags)
    add_output(flags)
    add_ends(flags.add_argument_group("to stop earlier; the schedule does not move"))
    add_overrides(flags)
    blocks = flags.add_mutually_exclusive_group()
    compiled = "torch.compile each residual block in training (off by default: whether it is faster is not measured)"
    blocks.add_argument("--compile", action="store_true", help=compiled)
    graphs = "launch each residual block in training as CUDA graphs, with the same bits (default: on one GPU)"
    blocks.add_argument("--cuda_graphs", action=argparse.BooleanOptionalAction, help=graphs)
    repeated = "let cuDNN and NCCL use only algorithms that give the same bits each time (a CPU has no others)"
    flags.add_argument("--deterministic", action="store_true", help=repeated)
    add_processes(flags)
    return flags


def add_data(flags: argparse.ArgumentParser) -> None:
    add = flags.add_argument
    folder = "train.beton and val.beton; else $IMAGENET_FFCV_DIR, else data/imagenet_ffcv"
    add("--data_dir", type=named, metavar="DIR", help=folder)
    add("--fake_data", action="store_true", help="seeded random images instead, as many as the JSON's num_images")
    threads = "decoding threads per process (default: cores / processes)"
    add("--loader_threads", type=positive, metavar="N", help=threads)
    add("--in_memory", action="store_true", help="read the data into memory while training begins")


def add_output(flags: argparse.ArgumentParser) -> None:
    add = flags.add_argument
    add(
        "--output_dir",
        type=named,
        metavar="DIR",
        help="log, checkpoints, curves and weights (default: runs/NAME OF THE JSON)",
    )
    add("--resume", action="store_true", help="go on from the newest checkpoint in --output_dir, if there is one")
    add("--evaluate_only", action="store_true", help="evaluate the newest checkpoint in --output_dir, on any data")
    in_place = "with --evaluate_only: evaluate this state_dict instead, such as a run's weights.pt"
    add("--weights", type=named, metavar="FILE", help=in_place)
    rarely = "evaluate only every N-th epoch, and those that judge the run: a classifier's last five, a detector's last"
    add("--evaluate_every", type=positive, metavar="N", default=1, help=rarely)
    against = "warn when training stays above the curve of these runs (at least 3 seeds of one recipe)"
    add("--baseline", type=named, nargs="+", metavar="RUN", help=against)
    often = "save every N iterations, or every N minutes (such as 10m), as well as after each epoch"
    add("--checkpoint_every", type=interval, metavar="N|Nm", help=often)


def add_ends(group: TakesFlags) -> None:
    group.add_argument("--epochs", type=positive, metavar="N", help="stop after this epoch")
    group.add_argument("--max_iterations", type=positive, metavar="N", help="stop after this many iterations in all")


def add_overrides(flags: argparse.ArgumentParser) -> None:
    """Add the flags that `overrides_of` reads. Recipes and `lbsgd plan` share them."""
    printed = "What depends on these values is derived again and printed."
    group = flags.add_argument_group("to override the JSON", printed)
    add = group.add_argument
    add("--global_batch", type=positive, metavar="KN", help="images per update (train_batch_size)")
    add("--micro_batch", type=positive, metavar="N", help="images per process and pass")
    add("--resolution", type=positive, metavar="PIXELS", help="side of the images")
    precision = "fp32: no precision block; bf16: torch_autocast; fp16: the fp16 block, and at least ZeRO stage 1"
    add("--precision", choices=PRECISIONS, help=precision)
    add("--seed", type=natural, metavar="N", help="seed of weights, shuffle and augmentation")
    add_settings(group)


def overrides_of(flags: argparse.Namespace) -> Overrides:
    """Return the flags' overrides of the JSON."""
    from lbsgd.config.overrides import Overrides  # late: a wrong flag is reported before pydantic loads

    return Overrides(
        flags.global_batch, flags.micro_batch, flags.resolution, flags.precision, flags.seed, tuple(flags.settings)
    )


def add_processes(flags: argparse.ArgumentParser) -> None:
    add = flags.add_argument
    add("--expect_world_size", type=positive, metavar="N", help="refuse to run with another number of processes")
    hang = "end if nothing moves for this long (default: %(default)s)"
    add("--hang_timeout", type=seconds, default=600, metavar="SECONDS", help=hang)
