"""The command behind recipes that simulate the paper's workers: from its flags to server, images and log."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lbsgd.commands.train import Request
from lbsgd.errors import ConfigError

if TYPE_CHECKING:  # a wrong flag is reported before torch loads
    from lbsgd.report.run_log import RunLog
    from lbsgd.train.images import Images
    from lbsgd.train.simulated import Server
    from lbsgd.train.task import Task

NOT_SIMULATED = (
    "evaluate_only",
    "max_iterations",
    "checkpoint_every",
    "compile",
    "cuda_graphs",
    "in_memory",
    "baseline",
)


def opened(
    request: Request,
    task: Task,
    described: dict[str, Any],
    stack: ExitStack,
    *,
    asynchronous: bool = False,
    spread: float = 0.0,
) -> tuple[Server, Images, RunLog]:
    """Return server, images and log; `stack` closes them. A run that was interrupted begins anew.

    task         a classifier, whose network is trained
    described    what the log's header says beside the plan, such as the model's name

    Raises ConfigError for what is not simulated.
    """
    require_simulable(request)
    import torch

    from lbsgd.data.share import Pixels
    from lbsgd.report.run_log import RunLog
    from lbsgd.train.facts import environment
    from lbsgd.train.images import FakeImageSource, FfcvFiles
    from lbsgd.train.run import require_writable
    from lbsgd.train.simulated import Server

    plan = replace(request.plan, micro_batch=request.plan.per_worker_batch)  # a worker's images in a batch
    threads = request.flags.loader_threads or 1
    source = FfcvFiles(request.data, threads) if request.data else FakeImageSource()
    require_writable(request.output_dir)
    pixels = Pixels(resolution=plan.recipe.augmentation.resolution, device=torch.device("cpu"))
    images = source.open(plan, request.processes, pixels, stack)
    header = {**described, **plan.as_dict(), "environment": environment(source.place)}
    log = stack.enter_context(RunLog(request.output_dir, header, 0 if request.flags.resume else None))
    torch.set_num_threads(threads)  # FFCV has changed it
    return Server(task.network(source.num_classes, plan), plan, asynchronous, spread), images, log


def require_simulable(request: Request) -> None:
    """Raise ConfigError for what the simulation would only seem to do: flags, several processes, fp16, bf16."""
    given = [flag for flag in NOT_SIMULATED if getattr(request.flags, flag)]
    if request.flags.evaluate_every > 1:
        given.append("evaluate_every")
    if given:
        raise ConfigError(f"the simulation does not know --{', --'.join(given)}; leave it out")
    if request.processes.world_size > 1:
        raise ConfigError("the workers are simulated on one process; start the recipe without a launcher")
    if request.plan.precision != "fp32":
        raise ConfigError(f"the workers are simulated in fp32, not {request.plan.precision}; give --precision fp32")
