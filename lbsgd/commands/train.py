"""The command behind every recipe: from its flags to a trained network.

Everything that can be wrong with the flags, the JSON or the data is found before PyTorch and DeepSpeed are imported.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import psutil

from lbsgd.commands.flag_types import Group, OneLineParser, add_settings, interval, named, natural, positive
from lbsgd.commands.plain_letters import print_plain_letters_where_needed
from lbsgd.commands.plan_lines import print_plan
from lbsgd.config.overrides import Overrides
from lbsgd.config.plan import Plan
from lbsgd.config.precision import PRECISIONS
from lbsgd.data.folder import ImageNetData, data_folder, open_data
from lbsgd.disk import OutputError, require_output
from lbsgd.errors import ConfigError, DataError, LbsgdError
from lbsgd.processes.ending import end_before_joining, end_despite_threads, end_with_error
from lbsgd.processes.environment import Processes
from lbsgd.processes.launcher import end_with_launcher, launchers, require_hosts, require_no_hostfile
from lbsgd.processes.start import Stopwatch
from lbsgd.train.facts import fingerprints
from lbsgd.train.live_page import Band, baseline_band
from lbsgd.train.run import Every, Run, last_iteration

if TYPE_CHECKING:
    from lbsgd.train.images import ImageSource
    from lbsgd.train.task import Task


def main(task: Task, description: str) -> None:
    """Run a recipe of a classifier (`run_recipe`)."""
    run_recipe(parser(description), Request, lambda request: task)


def run_recipe(flags: argparse.ArgumentParser, request_of: type[R], task_of: Callable[[R], Task]) -> None:
    """Run a recipe. Ends the process with the documented exit codes:

    0 done, 2 something given is wrong, 3 training diverged, 4 another process was lost, 75 told to stop and saved;
    1 with a traceback is a bug of ours.

    request_of    resolves the flags; task_of makes the task of what it has found, before anything heavy is imported
    """
    print_plain_letters_where_needed()
    started_by = launchers()  # read first: a launcher that dies during our slow imports is no longer our parent
    end_with_launcher(started_by)
    stopwatch = Stopwatch(started_by)
    try:
        require_output()
        require_no_hostfile(sys.argv)  # the parser would only call it an unknown flag
        request = request_of(flags.parse_args())
        task = task_of(request)
        if request.processes.is_rank_0:
            print_plan(request.plan, request.output_dir, request.data)
    except LbsgdError as error:
        end_before_joining(error)
    except OutputError as error:
        end_before_joining(error.refusal())
    stopwatch.lap("flags and data")
    try:
        start(task, request, started_by, stopwatch)
    except LbsgdError as error:
        end_with_error(error)
    end_despite_threads()


class Request:
    """The flags, resolved to plan, data and folder before anything heavy is imported.

    Raises LbsgdError for flags, a JSON or data that cannot be right.
    """

    data: ImageNetData | None = None  # a classifier's
    started_from: str | None = None  # what the first weights were trained as; a classifier begins with random ones

    def __init__(self, flags: argparse.Namespace):
        self.flags, self.processes = flags, Processes.from_environment()
        require_hosts(self.processes, flags.expect_world_size)
        self.weights = weights_of(flags, self.processes.is_rank_0)
        config, world_size, overrides = flags.deepspeed_config, self.processes.world_size, overrides_of(flags)
        self.plan = Plan.read(config, world_size, overrides=overrides)  # a mistake in the JSON is told first
        num_images = self.open_data()
        if num_images is not None:
            self.plan = Plan.read(config, world_size, num_images, overrides)
        self.output_dir = Path(flags.output_dir or Path("runs") / self.plan.name)
        self.baseline: Band = baseline_band(flags.baseline) if flags.baseline and self.processes.rank == 0 else ()
        self.last_iteration = last_iteration(self.plan, flags.epochs, flags.max_iterations)

    def open_data(self) -> int | None:
        """Open the data and return the number of training images; None where there is no data but fake data."""
        if self.plan.recipe.detection:
            raise ConfigError(
                f"{self.plan.name}.json is of a detector (lbsgd.detection), and this recipe trains a classifier: "
                "use recipes/mask_rcnn.py"
            )
        if self.flags.fake_data:
            return None
        self.data = open_data(data_folder(self.flags.data_dir))
        return self.data.train.num_images

    def images(self) -> ImageSource:
        """Return where the images of the run come from; imports PyTorch."""
        from lbsgd.train.images import FakeImageSource, FfcvFiles

        if not self.data:
            return FakeImageSource()
        return FfcvFiles(self.data, self.flags.loader_threads or self.processes.cores, self.flags.in_memory)


R = TypeVar("R", bound=Request)


def weights_of(flags: argparse.Namespace, is_rank_0: bool) -> Path | None:
    """Return the file that --weights names. Raises LbsgdError without --evaluate_only, and where there is no file.

    Rank 0 alone reads it, so the other hosts need not have it.
    """
    if flags.weights is None:
        return None
    if not flags.evaluate_only:
        raise ConfigError("--weights goes with --evaluate_only: training starts anew, or goes on with --resume")
    if is_rank_0 and not os.path.isfile(flags.weights):
        raise DataError(f"--weights {flags.weights}: no such file; it is a state_dict, such as a run's weights.pt")
    return Path(flags.weights)


def overrides_of(flags: argparse.Namespace) -> Overrides:
    """Return what the flags lay over the JSON."""
    return Overrides(
        flags.global_batch, flags.micro_batch, flags.resolution, flags.precision, flags.seed, tuple(flags.settings)
    )


def start(task: Task, request: Request, started_by: list[psutil.Process], stopwatch: Stopwatch) -> None:
    """Import what takes seconds, and train."""
    # PyTorch's C++ code prints stack traces when another process is gone, which bury the line that says so.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from lbsgd.train.session import Launch, train

    stopwatch.lap("imports")
    flags, processes, images = request.flags, request.processes, request.images()
    every = Every(*flags.checkpoint_every) if flags.checkpoint_every else Every()
    run = Run(
        task,
        request.plan,
        images,
        request.output_dir,
        request.last_iteration,
        resume=flags.resume,
        evaluate_only=flags.evaluate_only,
        weights=request.weights,
        every=every,
        evaluate_every=flags.evaluate_every,
        compiled=flags.compile,
        graphed=flags.cuda_graphs,
        baseline=request.baseline,
        started_from=request.started_from,
    )
    facts = fingerprints(request.plan, task, {**vars(flags), "local_rank": None}, images.fingerprint)
    train(run, Launch(processes, started_by, flags.hang_timeout, facts, stopwatch))


def parser(description: str) -> argparse.ArgumentParser:
    """Return the parser of a classifier's flags."""
    return with_flags(description, add_data)


def with_flags(description: str, add_data: Callable[[argparse.ArgumentParser], None]) -> argparse.ArgumentParser:
    """Return the parser of every recipe's flags, with those of its data."""
    flags = OneLineParser(description=description)
    flags.add_argument(
        "--deepspeed_config", type=named, required=True, metavar="JSON", help="the recipe, such as ds_configs/8k.json"
    )
    flags.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it, as LOCAL_RANK
    add_data(flags)
    add_output(flags)
    add_ends(flags.add_argument_group("ending earlier; the schedule does not move"))
    add_overrides(flags.add_argument_group("instead of the JSON's; what depends on them is derived again and printed"))
    blocks = flags.add_mutually_exclusive_group()
    compiled = "torch.compile each residual block in training (off by default: whether it is faster is not measured)"
    blocks.add_argument("--compile", action="store_true", help=compiled)
    graphs = "launch each residual block in training as CUDA graphs, with the same bits (default: on one GPU)"
    blocks.add_argument("--cuda_graphs", action=argparse.BooleanOptionalAction, help=graphs)
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
    in_place = "with --evaluate_only: a state_dict in its place, such as a run's weights.pt"
    add("--weights", type=named, metavar="FILE", help=in_place)
    rarely = (
        "evaluate every N-th epoch only, and those that the run is judged by: a classifier's last five, else the end"
    )
    add("--evaluate_every", type=positive, metavar="N", default=1, help=rarely)
    against = "warn when training leaves the curve of these runs, at least 3 seeds of one recipe"
    add("--baseline", type=named, nargs="+", metavar="RUN", help=against)
    often = "save every N iterations, or N minutes (as 10m), in addition to the end of each epoch"
    add("--checkpoint_every", type=interval, metavar="N|Nm", help=often)


def add_ends(group: Group) -> None:
    group.add_argument("--epochs", type=positive, metavar="N", help="stop after this epoch")
    group.add_argument("--max_iterations", type=positive, metavar="N", help="stop after this many iterations in all")


def add_overrides(group: Group) -> None:
    add = group.add_argument
    add("--global_batch", type=positive, metavar="KN", help="images per update (train_batch_size)")
    add("--micro_batch", type=positive, metavar="N", help="images that a process takes in one pass")
    add("--resolution", type=positive, metavar="PIXELS", help="side of the images")
    precision = "fp32: no precision block; bf16: torch_autocast; fp16: the fp16 block, ZeRO stage 1 at least"
    add("--precision", choices=PRECISIONS, help=precision)
    add("--seed", type=natural, metavar="N", help="of weights, shuffle and augmentation")
    add_settings(group)


def add_processes(flags: argparse.ArgumentParser) -> None:
    add = flags.add_argument
    add("--expect_world_size", type=positive, metavar="N", help="refuse to run with another number of processes")
    hang = "end if nothing moves for this long (default: %(default)s)"
    add("--hang_timeout", type=positive, default=600, metavar="SECONDS", help=hang)
