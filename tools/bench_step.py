"""One iteration of lbsgd's trainer against the same network and batch in a bare PyTorch loop.

    python tools/bench_step.py [--data_dir DIR] [--repeats N]

In turn in one run, so that only the ratio counts. The network is the same object in both: per-worker batch norm is
measured by bench_batchnorm.py. On a CPU: ResNet-18, 64x64, micro batch 64, fp32. On a GPU also ResNet-50 at 224 in
fp16 and bf16, micro batch 256 with n = 32, against PyTorch's autocast in channels_last. With --data_dir the trainer
is fed by the FFCV loader in a row of its own, which shows what waiting for data costs. The last rows are what a
checkpoint every 50 iterations costs (gathered, written and forced to the disk), and the diagnostics every 50.
"""

import argparse
import copy
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from lbsgd.algorithm.batch_norm import convert_batch_norm
from lbsgd.algorithm.resnet import resnet
from lbsgd.algorithm.sgd import decay_groups
from lbsgd.bench.contestants import autocast_step
from lbsgd.config.json_file import read_json
from lbsgd.config.overrides import Overrides
from lbsgd.config.plan import Plan
from lbsgd.data.fake import FakeImages
from lbsgd.data.folder import open_data
from lbsgd.data.share import Share
from lbsgd.processes.environment import Processes
from lbsgd.processes.guard import Guard
from lbsgd.train.engine import initialize, start_processes
from lbsgd.train.images import Images
from lbsgd.train.kernels import LAYOUT
from lbsgd.train.reporter import Silence
from lbsgd.train.saver import Saver
from lbsgd.train.session import device_name, pixels_of
from lbsgd.train.trainer import Trainer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "recipes"))

from resnet50 import ResNet50  # noqa: E402  beside the path above


def plan_for(micro_batch, resolution, precision, num_images, passes=1, **diagnostics):
    """The recipe at a global batch of so many micro batches: every iteration is so many passes and one update.

    ZeRO stage 0, which is the fastest, except for fp16, which DeepSpeed trains from stage 1 on only.
    """
    config = read_json(ROOT / "ds_configs/256.json")
    config["lbsgd"]["diagnostics"] = diagnostics
    if precision != "fp16":
        del config["fp16"]
        config["zero_optimization"]["stage"] = 0
    return Plan.read(
        config,
        1,
        num_images,
        Overrides(
            global_batch=passes * micro_batch, micro_batch=micro_batch, resolution=resolution, precision=precision
        ),
    )


def fake_images(plan, device, dtype=None):
    """Seeded images on the device, by default in the plan's precision; one rank takes each global batch in one pass."""
    pixels = pixels_of(plan, device)
    return FakeImages(
        plan.num_images,
        1000,
        seed=0,
        global_batch=plan.global_batch,
        micro_batch=plan.micro_batch,
        share=Share(),
        pixels=replace(pixels, dtype=dtype) if dtype else pixels,
    )


def our_step(model, plan, open_train_data, folder="unused"):
    """The trainer's own `update`, with everything it does beside computing: schedule, totals, the check for NaN."""
    engine, _ = initialize(model, plan)
    guard, saver = Guard(Processes.from_environment(), 600), Saver(engine, Path(folder), {}, {})
    trainer = Trainer(engine, plan, ResNet50(), Images(None, []), saver, guard, Silence())
    batches = open_train_data(engine.device).epoch(0)
    engine.train()
    return (lambda: trainer.update(batches)), trainer


def bare_step(model, plan, train_data, device):
    """What a careful engineer writes without any library: autocast, channels_last on a GPU, torch's own SGD."""
    model = model.to(device, memory_format=LAYOUT)
    convert_batch_norm(model, plan.per_worker_batch)
    params = plan.config["optimizer"]["params"]
    optimizer = torch.optim.SGD(
        decay_groups(model, params["weight_decay"]),
        lr=params["lr"],
        momentum=params["momentum"],
        nesterov=params["nesterov"],
    )
    model.train()
    return autocast_step(model, optimizer, train_data.epoch(0), plan.precision, device.type)


def seconds_of(step, device):
    synchronise = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    synchronise()
    began, cpu = time.perf_counter(), time.process_time()
    step()
    synchronise()
    return time.perf_counter() - began, time.process_time() - cpu


def in_turn(steps, device, repeats):
    """Median seconds and CPU seconds of each step; they take turns, and who begins changes with every round."""
    for step in steps * 3:
        seconds_of(step, device)
    seconds = {step: [] for step in steps}
    for repeat in range(repeats):
        for step in steps if repeat % 2 else reversed(steps):
            seconds[step].append(seconds_of(step, device))
    return [tuple(map(statistics.median, zip(*seconds[step], strict=True))) for step in steps]


def case_of(name, images, resolution, precision):
    """What is trained, as the rows say it."""
    return f"{name}, {resolution}x{resolution}, {images} images, n = 32, {precision}"


def row(table, what, num_images, bare, ours):
    """Add a row: images per second of both, and the ratios of time and of CPU time, which other load spoils less."""
    table.add_row(
        what,
        f"{num_images / bare[0]:.0f}",
        f"{num_images / ours[0]:.0f}",
        f"{ours[0] / bare[0]:.3f}",
        f"{ours[1] / bare[1]:.3f}",
        "-",
    )


def compare(table, name, micro_batch, resolution, precision, device, repeats):
    """A row: the bare loop and the trainer on the same seeded images, which are on the device already."""
    plan = plan_for(micro_batch, resolution, precision, num_images=10**6)

    model = resnet(name, 1000)
    bare = bare_step(copy.deepcopy(model), plan, fake_images(plan, device, torch.float32), device)
    ours, _ = our_step(model, plan, partial(fake_images, plan))
    row(
        table,
        f"{case_of(name, micro_batch, resolution, precision)}, fake data",
        micro_batch,
        *in_turn([bare, ours], device, repeats),
    )


def fed_by_the_loader(table, name, micro_batch, resolution, precision, device, repeats, data_dir):
    """A row: the trainer fed with real JPEGs by the FFCV loader, and the share of the time it waited."""
    from lbsgd.data.loaders import TrainLoader

    data = open_data(data_dir)
    plan = plan_for(micro_batch, resolution, precision, data.train.num_images)

    def load(device):
        return TrainLoader(
            data.train,
            seed=0,
            global_batch=micro_batch,
            micro_batch=micro_batch,
            threads=torch.get_num_threads(),
            share=Share(),
            pixels=pixels_of(plan, device),
        )

    step, trainer = our_step(resnet(name, data.num_classes), plan, load)
    warm_up = min(3, plan.iterations_per_epoch // 2)
    for _ in range(warm_up):
        seconds_of(step, device)
    trainer.clock.start_window()
    began = time.perf_counter()
    count = min(repeats, plan.iterations_per_epoch - warm_up)
    for _ in range(count):
        step()
    trainer.require_numbers()  # waits for the device
    seconds = time.perf_counter() - began
    table.add_row(
        f"{case_of(name, micro_batch, resolution, precision)}, {data_dir}",
        "-",
        f"{count * micro_batch / seconds:.0f}",
        "-",
        "-",
        f"{100 * trainer.clock.window_waited / seconds:.1f} %",
    )


def with_checkpoints(table, name, micro_batch, resolution, precision, device, repeats):
    """A row: what a checkpoint every 50 iterations adds, all of it counted as if no core were free for its thread."""
    plan = plan_for(micro_batch, resolution, precision, num_images=10**6)

    with tempfile.TemporaryDirectory(dir=".") as folder:
        step, trainer = our_step(resnet(name, 1000), plan, partial(fake_images, plan), folder)

        def checkpoint():
            trainer.save()
            trainer.saver.wait()

        update, whole = in_turn([step, checkpoint], device, repeats)
        trainer.saver.close()
    what = f"{case_of(name, micro_batch, resolution, precision)}: a checkpoint every 50 iterations, against none"
    every_50th(table, what, micro_batch, update, whole)


def every_50th(table, what, num_images, update, more):
    """A row: 50 updates, and 50 with something more once; each as (seconds, CPU seconds) of one."""
    plain = [50 * seconds for seconds in update]
    row(table, what, 50 * num_images, plain, [seconds + extra for seconds, extra in zip(plain, more, strict=True)])


def with_diagnostics(table, name, micro_batch, resolution, precision, device, repeats):
    """A row: what `diagnostics.gradient_noise: 50` adds to updates of two passes, which are the two chunks it needs."""
    plan_of = partial(plan_for, micro_batch, resolution, precision, 10**6, 2)
    plans = [plan_of(), plan_of(gradient_noise=1)]  # 1, to time each measurement
    steps = [our_step(resnet(name, 1000), plan, partial(fake_images, plan))[0] for plan in plans]
    update, measured = in_turn(steps, device, repeats)
    more = [one - other for one, other in zip(measured, update, strict=True)]
    case = case_of(name, f"2 x {micro_batch}", resolution, precision)
    every_50th(table, f"{case}: gradient noise every 50 iterations, against never", 2 * micro_batch, update, more)


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data_dir", help="FFCV files that the loader is to feed the trainer with")
    flags.add_argument("--repeats", type=int, default=30, help="timed iterations of each (default: 30)")
    arguments = flags.parse_args()
    start_processes()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = [("resnet18", 64, 64, "fp32")]
    if device.type == "cuda":
        cases += [("resnet50", 256, 224, "fp16"), ("resnet50", 256, 224, "bf16")]
    threads = f"{torch.get_num_threads()} threads"
    table = Table(title=f"images a second on {device_name()}, {threads}, median of {arguments.repeats}")
    for column in ("case", "bare PyTorch", "lbsgd", "time ratio", "CPU time ratio", "waiting for data"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for case in cases:
        compare(table, *case, device, arguments.repeats)
    if arguments.data_dir:
        fed_by_the_loader(table, *cases[-1], device, arguments.repeats, arguments.data_dir)
    with_checkpoints(table, *cases[-1], device, arguments.repeats)
    if cases[-1][3] != "fp16":  # whose gradients are scaled
        with_diagnostics(table, *cases[-1], device, arguments.repeats)
    # Where output is no terminal, rich takes 80 columns and breaks words.
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    sys.exit(main())
