"""lbsgd's loader against stock FFCV, torchvision and DALI on the same JPEG bytes, and against the bare decoder.

    python tools/bench_loader.py DATA [--images N] [--threads N] [--rounds N]

DATA holds train.beton. All contenders crop at random, resize to 224 and flip, in batches of 64. Each has its own
process, and they take turns, so that the ratios are comparable. torchvision and DALI read the same bytes from files.
DALI's CPU pipeline takes part if it is installed (pip install nvidia-dali-cuda120 nvidia-nvimgcodec-cu12). The bare
decoder only decodes whole images.
"""

import multiprocessing
import resource
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loader_contenders import BATCH, CONTENDERS, RESOLUTION
from rich.console import Console
from rich.table import Table

from lbsgd.bench.cpu_time import cpu_seconds
from lbsgd.commands.flag_types import OneLineParser, named, positive
from lbsgd.data.beton import BetonFile
from lbsgd.errors import ConfigError, LbsgdError, TrainingError, print_error
from lbsgd.processes.control_groups import usable_cores

WIDE = 160  # columns, more than the table has


def contend(pipe, contender, arguments):
    """Run an epoch on each request, and send (images, seconds, CPU seconds, peak memory in bytes)."""
    epochs = contender(*arguments)
    next(epochs)  # compiles, starts, fills the page cache
    pipe.send("ready")
    while is_asked(pipe):
        began, cpu = time.perf_counter(), cpu_seconds()
        images = next(epochs)
        pipe.send((images, time.perf_counter() - began, cpu_seconds() - cpu, peak_memory()))
    epochs.close()


def is_asked(pipe):
    """Whether another round is wanted. None is if another contender has failed."""
    try:
        return pipe.recv()
    except EOFError:
        return False


def peak_memory():
    """Return the peak bytes of this process plus those of its largest child."""
    return 1024 * sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def start(name, contender, arguments):
    pipe, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=contend, args=(theirs, contender, arguments))
    process.start()
    theirs.close()
    answer(name, pipe)
    return pipe


def turn(name, pipe):
    pipe.send(True)
    return answer(name, pipe)


def answer(name, pipe):
    """Return what a contender sends. Raises TrainingError if it has ended."""
    try:
        return pipe.recv()
    except EOFError:
        raise TrainingError(f"{name}: its process has ended; what it printed stands above") from None


def main():
    cores = usable_cores()
    flags = OneLineParser(description=__doc__)
    flags.add_argument("data", type=named, metavar="DATA", help="a data folder of the converter, with train.beton")
    flags.add_argument("--images", type=positive, default=3000, help="images per epoch (default: 3000)")
    flags.add_argument("--threads", type=positive, default=cores, help="threads or workers (default: all cores)")
    flags.add_argument("--rounds", type=positive, default=5, help="epochs of each contender (default: 5)")
    arguments = flags.parse_args()
    if arguments.threads > cores:
        flags.error(f"--threads {arguments.threads}: this process can use {cores} cores")
    try:
        rounds = measured(arguments)
    except LbsgdError as error:
        print_error(error)
        return error.exit_code
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)  # a file has no width, and Rich's guess of 80 would wrap the columns
    console.print(results(rounds, arguments.threads))
    return 0


def measured(arguments):
    """Return (images, seconds, CPU seconds, peak memory) of each round, by the contenders' names."""
    shared = (arguments.data, arguments.threads, whole_batches(arguments.data, arguments.images))
    pipes = {
        name: start(name, contender, shared)
        for name, contender in CONTENDERS.items()
        if name != "DALI, CPU" or (find_spec("nvidia") and find_spec("nvidia.dali"))
    }
    rounds: dict[str, list[Any]] = {name: [] for name in pipes}
    for _ in range(arguments.rounds):
        for name, pipe in pipes.items():
            rounds[name].append(turn(name, pipe))
    for pipe in pipes.values():
        pipe.send(False)
    return rounds


def whole_batches(data, num_images):
    """Return num_images rounded down to whole batches. Raises LbsgdError if train.beton has fewer."""
    found = BetonFile.open(Path(data) / "train.beton").num_images
    if not BATCH <= num_images <= found:
        raise ConfigError(
            f"--images {num_images}: {data}/train.beton has {found:,} images; choose {BATCH} (a batch) to {found:,}"
        )
    return num_images // BATCH * BATCH


def results(rounds, threads):
    num_rounds = len(rounds["torchvision"])
    table = Table(title=f"random resized crop to {RESOLUTION}, flip; {threads} threads; median of {num_rounds} epochs")
    for column in ("", "images/s", "to FFCV", "images/CPU second", "to FFCV", "peak memory"):
        table.add_column(column, justify="right" if column else "left")
    speed, per_cpu_second = (
        {name: statistics.median(images / used[place] for images, *used in turns) for name, turns in rounds.items()}
        for place in (0, 1)
    )
    for name, turns in rounds.items():
        rival = "FFCV, to pixels" if name.endswith("to pixels") else "FFCV, normalised"
        table.add_row(
            name,
            f"{speed[name]:.0f}",
            f"{speed[name] / speed[rival]:.2f}",
            f"{per_cpu_second[name]:.0f}",
            f"{per_cpu_second[name] / per_cpu_second[rival]:.2f}",
            f"{turns[-1][3] / 1e6:.0f} MB",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
