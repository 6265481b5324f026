"""The command behind every recipe: from its flags to a trained network.

Mistakes in the flags, the JSON or the data are found before PyTorch and DeepSpeed are imported, except those that only
the network or the device shows.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import psutil

from lbsgd.commands.plain_letters import print_plain_letters_where_needed
from lbsgd.commands.plan_lines import print_plan
from lbsgd.commands.recipe_flags import overrides_of, parser
from lbsgd.commands.recipe_task import require_maker, require_task
from lbsgd.commands.trained_on import header_in, other_class, run_of
from lbsgd.config.plan import Plan
from lbsgd.data.folder import ValData, data_folder, open_data, open_val
from lbsgd.data.host_files import keep_torchs_code, keep_tritons_code
from lbsgd.errors import ConfigError, DataError, LbsgdError
from lbsgd.output import hold_closed_streams, require_output
from lbsgd.processes.ending import (
    before_joining,
    end_at_a_signal,
    end_despite_threads,
    end_with_error,
    found_by_rank_0,
)
from lbsgd.processes.environment import Processes
from lbsgd.processes.launcher import end_with_launcher, launchers, require_hosts, require_no_hostfile
from lbsgd.processes.stopwatch import Stopwatch
from lbsgd.processes.surroundings import importing, require_compiling, require_surroundings
from lbsgd.report.lines import say_fact, warn
from lbsgd.train.checkpoint_names import named_at_start
from lbsgd.train.facts import SCRIPT, fingerprints
from lbsgd.train.live_page import Limits, baseline_limits
from lbsgd.train.run import CHECKPOINTS, Every, Run, last_iteration, require_place, require_writable

if TYPE_CHECKING:
    from lbsgd.train.images import ImageSource
    from lbsgd.train.task import Task

R = TypeVar("R", bound="Request")


def main(task: Task, description: str) -> None:
    """Run a recipe of a classifier (`run_recipe`)."""
    run_recipe(parser(description), Request, lambda request: task)


def run_recipe(flags: argparse.ArgumentParser, request_of: type[R], task_of: Callable[[R], Task]) -> None:
    """Run a recipe. Ends the process with the documented exit codes:

    0 done, 2 something given is wrong, 3 training diverged, 4 another process was lost, 75 told to stop and saved;
    1 with a traceback is a bug, ours or the recipe's.

    request_of    resolves the flags
    task_of       makes the task from the request, before anything heavy is imported
    """
    hold_closed_streams()
    print_plain_letters_where_needed()
    # If another process is gone, PyTorch's C++ code prints stack traces, which would bury the line that says so.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    started_by = launchers()  # read first: a launcher that dies during our slow imports is no longer our parent
    end_with_launcher(started_by)
    told = bool(started_by)  # signals then come from the launcher, which also sends one after another process's error
    end_at_a_signal(" at the start; the same command with --resume goes on", quiet=told)
    stopwatch = Stopwatch(started_by)
    with before_joining():
        require_output()
        require_no_hostfile(sys.argv)  # the parser would only call it an unknown flag
        require_surroundings()
        require_maker(task_of)
        request = request_of(flags.parse_args())
        keep_torchs_code(request.flags.compile)
        keep_tritons_code()
        task = task_of(request)
        require_task(task)
        if request.processes.is_rank_0:
            with found_by_rank_0():
                request.require_place()
            print_plan(request.plan, request.output_dir, request.data, not request.flags.evaluate_only)
            if sys.stdout.isatty():  # a person may be waiting for the next line
                say_fact("loading", "PyTorch and DeepSpeed")
    stopwatch.lap("flags and data")
    with before_joining(), importing():
        import lbsgd.train.session  # noqa: F401  takes seconds
    stopwatch.lap("imports")
    try:
        start(task, request, started_by, stopwatch)
    except LbsgdError as error:
        end_with_error(error)
    end_despite_threads(request.processes)


class Request:
    """The flags, resolved to plan, data and folder before anything heavy is imported.

    Raises LbsgdError if the flags, the JSON or the data are wrong.
    """

    data: ValData | None = None  # of a classifier
    started_from: str | None = None  # how the first weights were trained; a classifier begins with random ones

    def __init__(self, flags: argparse.Namespace):
        self.flags, self.processes = flags, Processes.from_environment()
        require_hosts(self.processes, flags.expect_world_size)
        self.weights = weights_of(flags, self.processes.is_rank_0)
        config, world_size, overrides = flags.deepspeed_config, self.processes.world_size, overrides_of(flags)
        self.plan = Plan.read(config, world_size, overrides=overrides)  # reports a mistake in the JSON first
        self.output_dir = Path(flags.output_dir or Path("runs") / self.plan.name)
        num_images = self.open_data()
        if num_images is not None:
            self.plan = Plan.read(config, world_size, num_images, overrides)
        self.baseline: Limits = {}
        if flags.baseline and self.processes.is_rank_0:
            with found_by_rank_0():
                self.baseline = baseline_limits(flags.baseline)
        self.last_iteration = last_iteration(self.plan, flags.epochs, flags.max_iterations)

    def open_data(self) -> int | None:
        """Open the data and return the number of training images.

        Return None to keep the JSON's number: with fake data, or if an evaluation reads no training images.
        """
        if self.plan.recipe.detection:
            raise ConfigError(
                f"{self.plan.name}.json is for a detector (lbsgd.detection), and this recipe trains a classifier: "
                "use recipes/mask_rcnn.py"
            )
        if self.flags.fake_data:
            return None
        require_compiling()
        folder = data_folder(self.flags.data_dir)
        if self.flags.evaluate_only and self.plan.recipe.batch_norm.statistics != "recomputed":
            self.data = open_val(folder)
            return None
        self.data = data = open_data(folder)
        return data.train.num_images

    def require_place(self) -> None:
        """Raise LbsgdError if the run may not use its output folder. The folder is checked again once it is locked.

        Only rank 0 calls this. An evaluation's data are compared with those that its weights were trained on.
        """
        flags, folder = self.flags, self.output_dir
        if not flags.evaluate_only:
            require_writable(folder)
        require_place(
            folder,
            bool(named_at_start(folder / CHECKPOINTS)),
            resume=flags.resume,
            evaluate_only=flags.evaluate_only,
            weights=self.weights is not None,
        )
        if flags.evaluate_only:
            self.compare_with_training(run_of(self.weights) if self.weights else folder)

    def compare_with_training(self, folder: Path) -> None:
        """Warn if a label meant another class to a run's weights. It is no error: one class may have two names."""
        trained, here = header_in(folder).get("classes"), self.data and self.data.classes
        other = other_class(trained, here) if trained and here else None
        if other:
            warn(f"{other}, so the validation error says nothing unless the two are names of one class")

    def images(self) -> ImageSource:
        """Return the source of the run's images. Imports PyTorch."""
        from lbsgd.train.images import fake_images, ffcv_files

        if not self.data:
            return fake_images()
        return ffcv_files(self.data, self.flags.loader_threads or self.processes.cores, self.flags.in_memory)


def weights_of(flags: argparse.Namespace, is_rank_0: bool) -> Path | None:
    """Return the file that --weights names. Raises LbsgdError without --evaluate_only, and if there is no file.

    Only rank 0 reads the file, so other hosts need not have it.
    """
    if flags.weights is None:
        return None
    if not flags.evaluate_only:
        raise ConfigError("--weights goes with --evaluate_only: training starts anew, or goes on with --resume")
    if is_rank_0 and not os.path.isfile(flags.weights):
        with found_by_rank_0():
            raise DataError(f"--weights {flags.weights}: no such file; it is a state_dict, such as a run's weights.pt")
    return Path(flags.weights)


def start(task: Task, request: Request, started_by: list[psutil.Process], stopwatch: Stopwatch) -> None:
    """Train, or evaluate."""
    from lbsgd.train.session import train

    flags, processes, images = request.flags, request.processes, request.images()
    every = Every(*flags.checkpoint_every) if flags.checkpoint_every else Every()
    facts = fingerprints(request.plan, task, {**vars(flags), "local_rank": None}, images.fingerprint)
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
        deterministic=flags.deterministic,
        baseline=request.baseline,
        started_from=request.started_from,
        script=facts[SCRIPT],
    )
    train(run, processes, started_by, flags.hang_timeout, facts, stopwatch)
