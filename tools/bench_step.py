"""Measure the cost of an update on a CPU: against a bare PyTorch loop, with checkpoints, diagnostics and real images.

    python tools/bench_step.py [--data_dir DIR] [--rounds N]

ResNet-18 on 64 images of 64x64, batch norm over n = 32, fp32, one process. Both sides take turns in one run, in CPU
time, which other work on the machine affects least; ratios have 95 % intervals over the rounds. With --data_dir the
FFCV loader feeds the trainer, which shows how long it waits. Work that is done every 50 iterations is measured each
time and counted once in 50 updates. A checkpoint is gathered, written and forced to the disk. `tools/bench_gpu.py`
measures a GPU.
"""

import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")  # for both sides, even if there is a GPU

import torch
from resnet18 import ResNet18

from lbsgd.bench.contestants import (
    our_step,
    our_trainer,
    plain_step,
    plan_for,
    step_of,
    with_batch_norm,
    without_end,
)
from lbsgd.bench.feeding import loader_for, window
from lbsgd.bench.figure import mean_figure, ratio_figure
from lbsgd.bench.rounds import compared, in_turn, milliseconds
from lbsgd.bench.sizes import ON_A_CPU, BenchSettings
from lbsgd.commands.flag_types import OneLineParser, named, positive
from lbsgd.data.folder import open_data
from lbsgd.errors import LbsgdError, print_error
from lbsgd.report.bench_tables import value_words
from lbsgd.train.engine import start_processes

ROOT = Path(__file__).resolve().parent.parent
OFTEN, WINDOWS = 50, 10
SIZES = replace(ON_A_CPU, resolution=64, per_worker_batch=32, step_batch=64, warm_up=3)


def update_plan(given, **settings):
    return plan_for(given, given.sizes.step_batch, "fp32", **settings)


def against_plain(given, rounds):
    """Compare the trainer's own update, with everything that it does besides computing, with a bare loop."""
    plan = update_plan(given)
    steps = {"plain": plain_step(given, plan, with_batch_norm(plan, "loop")), "lbsgd": our_step(given, plan)}
    found = measured(given, steps, rounds)
    return compared("lbsgd / a bare PyTorch loop", found, "lbsgd", "plain")


def with_checkpoints(given, rounds):
    """Measure what a checkpoint adds, counted as if no core were free for its thread."""
    plan = update_plan(given)
    trainer = our_trainer(given, plan)

    def checkpoint():
        trainer.save()
        trainer.saver.wait()

    found = measured(given, {"update": step_of(trainer, plan), "checkpoint": checkpoint}, rounds)
    trainer.saver.close()
    return every_50th("a checkpoint every 50 iterations / none", found["update"], found["checkpoint"])


def with_diagnostics(given, rounds):
    """Measure what `diagnostics.gradient_noise` adds to updates of two passes, the two chunks that it needs."""
    settings = {"update": (), "with noise": ("lbsgd.diagnostics.gradient_noise=1",)}  # 1, to time each measurement
    plans = {name: update_plan(given, passes=2, more=more) for name, more in settings.items()}
    found = measured(given, {name: our_step(given, plan) for name, plan in plans.items()}, rounds)
    more = [noisy - update for noisy, update in zip(found["with noise"], found["update"], strict=True)]
    return every_50th("gradient noise every 50 iterations / never, 2 passes", found["update"], more)


def measured(given, steps, rounds):
    return in_turn(steps, "cpu", rounds=rounds, calls=1, warm_up=given.sizes.warm_up)


def every_50th(name, update, more):
    """Return the ratio of 50 updates plus `more` once to 50 updates alone, from the seconds of each round."""
    plain = [OFTEN * seconds for seconds in update]
    whole = [seconds + extra for seconds, extra in zip(plain, more, strict=True)]
    return ratio_figure(name, whole, plain, beside=milliseconds({"update": update, "more": more}))


def waiting(given, rounds, data):
    """Measure the share of its time that the trainer waits for the loader."""
    plan = update_plan(given, num_images=data.train.num_images)
    trainer = our_trainer(given, plan)
    loader = loader_for(data.train, plan, trainer.engine.device, torch.get_num_threads())
    batches = without_end(loader.epoch)
    window(trainer, batches, given.sizes.warm_up)
    waits, speeds = zip(*(window(trainer, batches, max(1, rounds // WINDOWS)) for _ in range(WINDOWS)), strict=True)
    loader.close()
    return mean_figure("waiting for data", waits, unit="% of the time", beside=f"{median(speeds):.0f} images/s")


def main():
    flags = OneLineParser(description=__doc__)
    flags.add_argument("--data_dir", type=named, help="FFCV files that the loader feeds the trainer with")
    flags.add_argument("--rounds", type=positive, default=30, help="timed updates of each (default: 30)")
    arguments = flags.parse_args()
    try:
        data = open_data(arguments.data_dir) if arguments.data_dir else None  # early, so that an error costs no minutes
    except LbsgdError as error:
        print_error(error)
        return error.exit_code
    start_processes()
    images, side, n, threads = SIZES.step_batch, SIZES.resolution, SIZES.per_worker_batch, torch.get_num_threads()
    print(f"ResNet-18, {images} images of {side}x{side}, n = {n}, fp32, {threads} threads, CPU time")
    with tempfile.TemporaryDirectory() as folder:
        given = BenchSettings(SIZES, "cpu", ROOT, Path(folder), None, ResNet18())
        parts = [against_plain, with_checkpoints, with_diagnostics]
        try:
            for part in parts:
                say(part(given, arguments.rounds))
            if data:
                say(waiting(given, arguments.rounds, data))
        except LbsgdError as error:
            print_error(error)
            return error.exit_code
    return 0


def say(figure):
    words = value_words(figure.value, figure.low, figure.high, figure.unit)
    print(f"{figure.name}: {words} ({figure.beside})", flush=True)


if __name__ == "__main__":
    sys.exit(main())
