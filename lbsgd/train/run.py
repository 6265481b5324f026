"""From a command line to a trained network: what every recipe shares.

Everything that can be wrong with the flags, the JSON or the data is found before PyTorch and DeepSpeed are imported.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from lbsgd.config.json_file import Overrides
from lbsgd.config.plan import Plan
from lbsgd.data.folder import ImageNetData, data_folder, open_data
from lbsgd.errors import ConfigError, LbsgdError, print_error
from lbsgd.processes.launcher import Processes, end_with_error, end_with_launcher, launchers, require_hosts

FAKE_CLASSES = 1000


def main(model: str, network: Callable, description: str) -> None:
    """Runs a recipe: `network(num_classes, plan)` builds the model. Ends the process with the documented exit codes:

    0 done, 2 something given is wrong, 3 training diverged, 4 another process was lost, 75 told to stop and saved;
    1 with a traceback is a bug of ours.
    """
    started_by = launchers()  # asked first: who dies while we import for seconds is nobody's parent any more
    end_with_launcher(started_by)
    arguments = parser(model, description).parse_args()
    try:
        run = Run(model, network, arguments, started_by)
    except LbsgdError as error:
        end_before_joining(error)
    try:
        run.start()
    except LbsgdError as error:
        end_with_error(error)


def end_before_joining(error: LbsgdError) -> NoReturn:
    """Ends this process before it has met the others, and all of them with it.

    What one process finds, the others of its host mostly find at the same time, and the launcher ends them with the first
    that ends: so the first one speaks, and another only if it lives on since the error was its own. The processes of other
    hosts, which no launcher ends, are told where they wait.
    """
    processes = Processes.from_environment()
    if processes.local_rank:
        time.sleep(5)
    print_error(error)
    if processes.world_size > processes.local_world_size:
        from lbsgd.processes.peers import tell_before_joining

        tell_before_joining(processes, error)
    end_with_error(error, speak=False)


def parser(model: str, description: str) -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = flags.add_argument
    add("--deepspeed_config", required=True, metavar="JSON", help="the recipe, such as ds_configs/8k.json")
    add("--data_dir", metavar="DIR", help="train.beton and val.beton; else $IMAGENET_FFCV_DIR, else data/imagenet_ffcv")
    add("--fake_data", action="store_true", help="seeded random images instead, as many as the JSON's num_images")
    add("--output_dir", metavar="DIR", help="log, checkpoints, curves and weights (default: runs/NAME OF THE JSON)")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --output_dir, if there is one")
    add("--evaluate_only", action="store_true", help="evaluate the newest checkpoint in --output_dir")
    ends = flags.add_argument_group("ending earlier; the schedule does not move")
    ends.add_argument("--epochs", type=positive, metavar="N", help="stop after this epoch")
    ends.add_argument("--max_iterations", type=positive, metavar="N", help="stop after this many iterations in all")
    over = flags.add_argument_group("instead of the JSON's; what depends on them is derived again and printed")
    over.add_argument("--global_batch", type=positive, metavar="KN", help="images an update (train_batch_size)")
    over.add_argument("--micro_batch", type=positive, metavar="N", help="images a process takes in one pass")
    over.add_argument("--resolution", type=positive, metavar="PIXELS", help="side of the images")
    over.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        help="fp32: no precision block; bf16: torch_autocast; fp16: the fp16 block, ZeRO stage 1 at least",
    )
    over.add_argument("--seed", type=natural, metavar="N", help="of weights, shuffle and augmentation")
    add(
        "--checkpoint_every",
        type=interval,
        metavar="N|Nm",
        help="save every N iterations, or N minutes (as 10m), beside the end of each epoch",
    )
    add(
        "--hang_timeout",
        type=positive,
        default=600,
        metavar="SECONDS",
        help="end when nothing moves for so long (default: 600)",
    )
    over.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="KEY=VALUE",
        help="any key of the JSON, such as lbsgd.warmup.epochs=2; null deletes it; may be repeated",
    )
    add(
        "--loader_threads",
        type=positive,
        metavar="N",
        help="threads that decode, a process (default: cores / processes)",
    )
    add("--in_memory", action="store_true", help="read the data into memory before training begins")
    add("--expect_world_size", type=positive, metavar="N", help="refuse to run with another number of processes")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it; LOCAL_RANK says the same
    return flags


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def interval(text: str) -> tuple[int | None, float | None]:
    """Iterations and minutes, one of them None: `50` or `10m`."""
    if text.isdigit() and int(text):
        return int(text), None
    try:
        minutes = float(text.removesuffix("m"))
    except ValueError:
        minutes = 0
    if not (text.endswith("m") and 0 < minutes < float("inf")):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of iterations, such as 50, nor of minutes, such as 10m"
        )
    return None, minutes


def natural(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


class Run:
    """One command: its flags resolved to plan, data and folders; then engine and trainer."""

    def __init__(self, model: str, network: Callable, arguments: argparse.Namespace, started_by: list):
        self.model, self.network, self.arguments, self.started_by = model, network, arguments, started_by
        self.processes = Processes.from_environment()
        require_hosts(self.processes, arguments.expect_world_size)
        overrides = Overrides(
            arguments.global_batch,
            arguments.micro_batch,
            arguments.resolution,
            arguments.precision,
            arguments.seed,
            tuple(arguments.settings),
        )
        config, world_size = arguments.deepspeed_config, self.processes.world_size
        self.plan = Plan.read(
            config, world_size, overrides=overrides
        )  # a mistake in the JSON is told before one in the data
        self.data: ImageNetData | None = None
        if not arguments.fake_data:
            self.data = open_data(data_folder(arguments.data_dir))
            self.plan = Plan.read(config, world_size, self.data.train.num_images, overrides)
        self.output_dir = Path(arguments.output_dir or Path("runs") / self.plan.name)
        self.last_iteration = last_iteration(self.plan, arguments.epochs, arguments.max_iterations)

    @property
    def speaks(self) -> bool:
        """Whether this process prints and writes; one of all does."""
        return self.processes.rank == 0

    def start(self) -> None:
        if self.speaks:
            self.print_plan()
        # PyTorch's C++ code prints stack traces when another process is gone, which bury the line that says so.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from lbsgd.train.session import train  # imports PyTorch and DeepSpeed, which take seconds

        train(self)

    def print_plan(self) -> None:
        for name, value in self.plan.summary().items():
            print(f"{name:15}{value}")
        for change in self.plan.changes:
            print(f"{'changed':15}{change}")
        for warning in self.plan.warnings:
            print(f"warning: {self.plan.name}.json: {warning}")
        print(f"{'output':15}{self.output_dir}", flush=True)

    def fingerprints(self) -> dict[str, str]:
        """What all processes must have in common, whatever host they run on."""
        flags = {**vars(self.arguments), "local_rank": None}
        return {
            "configuration": digest(json.dumps([self.plan.config, self.plan.recipe.model_dump()]).encode()),
            **code_of(Path(__file__).parent.parent),
            "recipe script": digest(Path(sys.argv[0]).read_bytes()) if Path(sys.argv[0]).is_file() else "",
            "flags": json.dumps(flags),
            "version of torch": installed("torch") or "",
            "data": self.data.fingerprint if self.data else "fake",
        }

    def environment(self) -> dict[str, Any]:
        """Where and how the run ran, for the log."""
        return {
            "command": sys.argv,
            "host": platform.node(),
            "python": platform.python_version(),
            "packages": {name: installed(name) for name in ("lbsgd", "torch", "torchvision", "deepspeed", "ffcv")},
            "data": str(self.data.train.path.parent) if self.data else "fake",
            "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }


def code_of(package: Path) -> dict[str, str]:
    """The sources, and whether the C among them is compiled, as its pixels differ a little from those of what stands in for it."""
    sources = sorted(path for kind in ("py", "c", "h") for path in package.rglob(f"*.{kind}"))
    return {
        "code of lbsgd": digest(*(path.read_bytes() for path in sources)),
        "compiled kernels of lbsgd": str(any(package.rglob("_kernels*.so"))),
    }


def last_iteration(plan: Plan, epochs: int | None, max_iterations: int | None) -> int:
    """Where the run ends: at the end of the schedule, or earlier where a flag says so; later is refused."""
    for flag, asked, most in (
        ("--epochs", epochs, plan.recipe.epochs),
        ("--max_iterations", max_iterations, plan.num_iterations),
    ):
        if asked and asked > most:
            raise ConfigError(
                f"{flag} {asked} is more than the {most} of {plan.name}.json; it ends a run earlier, and does not "
                "move its schedule: for a longer one change lbsgd.epochs and lbsgd.decay there"
            )
    return min(
        plan.num_iterations,
        max_iterations or plan.num_iterations,
        (epochs or plan.recipe.epochs) * plan.iterations_per_epoch,
    )


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
