"""The command behind recipes that simulate the paper's workers: from the flags to server, images and log."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbsgd.commands.flag_types import reword
from lbsgd.commands.plain_letters import print_plain_letters_where_needed
from lbsgd.commands.plan_lines import print_plan
from lbsgd.commands.recipe_flags import parser
from lbsgd.commands.recipe_task import require_task
from lbsgd.commands.train import Request
from lbsgd.disk import is_there
from lbsgd.errors import ConfigError, LbsgdError
from lbsgd.output import OutputError, hold_closed_streams, require_output, say
from lbsgd.processes.ending import end_at_a_signal, end_with_error
from lbsgd.processes.surroundings import importing, require_surroundings
from lbsgd.report.lines import say_fact
from lbsgd.report.run_log import LOG_NAME, RunLog, read_run
from lbsgd.train.run import CHECKPOINTS, only_writer

if TYPE_CHECKING:  # a wrong flag is reported before torch loads
    from lbsgd.data.share import EvalData, TrainData
    from lbsgd.train.simulated import Server
    from lbsgd.train.task import Task

NOT_SIMULATED = (
    "evaluate_only",
    "max_iterations",
    "checkpoint_every",
    "evaluate_every",
    "hang_timeout",
    "compile",
    "cuda_graphs",
    "deterministic",
    "in_memory",
    "baseline",
)
WORDS = dict.fromkeys((*NOT_SIMULATED, "weights")) | {  # of --help
    "output_dir": "the log (default: runs/NAME OF THE JSON)",
    "resume": "begin again in the folder of the same simulation, which saves no checkpoints",
    "loader_threads": "decoding threads (default: 1)",
}


@dataclass(frozen=True)
class Simulation:
    """The simulated workers of one process, their images, and the log, whose epochs are also printed."""

    server: Server
    train: TrainData
    val: EvalData
    log: RunLog
    num_epochs: int

    def epoch(self, record: dict[str, Any]) -> None:
        self.log.epoch(record)
        errors = f"train {record['train_top1_error_pct']:5.2f} %  val {record['val_top1_error_pct']:5.2f} %"
        say(f"epoch {record['epoch']}/{self.num_epochs}  error: {errors}  loss {record['train_loss']:.4f}")

    def result(self) -> None:
        self.log.result()
        say_fact("log", self.log.path)


def run_simulation(flags: argparse.ArgumentParser, simulate: Callable[[Request], None]) -> None:
    """Run a simulating recipe. Errors end the process with the exit codes of `commands.train.run_recipe`."""
    hold_closed_streams()
    print_plain_letters_where_needed()
    end_at_a_signal("; a simulation saves nothing: the same command with --resume starts it again")
    try:
        require_output()
        require_surroundings()
        reword(flags, WORDS)
        simulate(Request(flags.parse_args()))
    except LbsgdError as error:
        end_with_error(error)
    except OutputError as error:
        end_with_error(error.refusal())


def opened(
    request: Request,
    task: Task,
    described: dict[str, Any],
    stack: ExitStack,
    *,
    asynchronous: bool = False,
    spread: float = 0.0,
) -> Simulation:
    """Print the plan, and return server, images and log. `stack` closes them.

    task         a classifier, whose network is trained
    described    entries of the log's header in addition to the plan, such as the model's name

    Raises ConfigError if flags or JSON ask for what is not simulated, or if the output folder holds a run.
    """
    require_task(task)
    require_simulable(request)
    # On one process, a worker's images in a pass.
    n, k = request.plan.per_worker_batch, request.plan.num_workers
    plan = replace(request.plan, micro_batch=n, accumulation_steps=k)
    described = {**described, **plan.as_dict()}
    stack.enter_context(only_writer(request.output_dir))
    require_no_run(request, described)
    print_plan(request.plan, request.output_dir, request.data)
    with importing():
        import torch

    from lbsgd.data.share import Pixels
    from lbsgd.train.facts import environment, script_of
    from lbsgd.train.images import fake_images, ffcv_files
    from lbsgd.train.random_states import seed_random_numbers
    from lbsgd.train.simulated import Server

    threads = request.flags.loader_threads or 1
    source = ffcv_files(request.data, threads) if request.data else fake_images()
    pixels = Pixels(resolution=plan.recipe.augmentation.resolution, device=torch.device("cpu"))
    images = source.open(plan, request.processes, pixels, stack)
    header = {**described, "environment": {**environment(source.place), "script": script_of(task)}}
    log = stack.enter_context(RunLog(request.output_dir, header, 0 if request.flags.resume else None))
    torch.set_num_threads(threads)  # FFCV has changed it
    seed_random_numbers(plan.recipe.seed)
    server = Server(task.network(source.num_classes, plan), plan, asynchronous, spread)
    assert images.train, "a simulation trains"
    return Simulation(server, images.train, images.val, log, request.flags.epochs or int(plan.num_epochs))


def require_simulable(request: Request) -> None:
    """Raise ConfigError for flags, keys of the JSON and several processes that the simulation would ignore."""
    usual = parser("").get_default
    given = [flag for flag in NOT_SIMULATED if getattr(request.flags, flag) not in (usual(flag), False)]
    if given:
        raise ConfigError(f"the simulation does not know --{', --'.join(given)}; leave it out")
    if request.processes.world_size > 1:
        raise ConfigError("the workers are simulated on one process; start the recipe without a launcher")
    if request.plan.precision != "fp32":
        raise ConfigError(f"the workers are simulated in fp32, not {request.plan.precision}; give --precision fp32")
    epochs = request.flags.epochs or request.plan.num_epochs
    if epochs % 1 or epochs > request.plan.num_epochs:
        raise ConfigError(
            f"the simulation takes whole epochs, and {request.plan.name}.json has {request.plan.num_epochs:g}; "
            "give fewer with --epochs, or change lbsgd.epochs"
        )
    norm = request.plan.recipe.batch_norm
    noise = request.plan.recipe.diagnostics.gradient_noise
    for key, found, simulated in (
        ("batch_norm.scope", norm.scope, ("worker",)),
        ("batch_norm.statistics", norm.statistics, ("average",)),
        ("batch_norm.implementation", norm.implementation, ("loop", "rule")),
        ("diagnostics.gradient_noise", noise, (None,)),
    ):
        if found not in simulated:
            instead = "null" if simulated[0] is None else simulated[0]
            raise ConfigError(
                f"{request.plan.name}.json: lbsgd.{key} is {found}, which is not simulated; set lbsgd.{key}={instead}"
            )


def require_no_run(request: Request, described: dict[str, Any]) -> None:
    """Raise ConfigError if the output folder holds a run. --resume starts the same simulation again if it was cut off.

    `lbsgd reproduce` gives --resume, so that its command is the same each time.
    """
    folder = request.output_dir
    if is_there(folder / LOG_NAME) or is_there(folder / CHECKPOINTS):
        if not (request.flags.resume and is_cut(folder, described)):
            raise ConfigError(
                f"{folder} already holds a run that no simulation can continue; choose another --output_dir"
            )
        say(f"the simulation in {folder} was interrupted: starting it again")


def is_cut(folder: Path, described: dict[str, Any]) -> bool:
    """Whether a folder holds only this same simulation, without its end."""
    if is_there(folder / CHECKPOINTS):
        return False
    run = read_run(folder)
    same = json.loads(json.dumps(described))  # as it looks in a log
    return run.result is None and {key: run.header.get(key) for key in same} == same
