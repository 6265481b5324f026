"""One iteration of lbsgd's trainer against the same network and batch in a bare PyTorch loop.

    python tools/bench_step.py [--data_dir DIR] [--repeats N] [--checkpoint_blocks N]

In turn in one run, so that only the ratio counts. The network is the same object in both: per-worker batch norm is
measured by bench_batchnorm.py. On a CPU: ResNet-18, 64x64, micro batch 64, fp32. On a GPU also ResNet-50 at 224 in fp16
and bf16, micro batch 256 with n = 32, against PyTorch's autocast in channels_last. With --data_dir the trainer is fed by
the FFCV loader in a row of its own, which shows what waiting for data costs. A last row is what a checkpoint every 50
iterations costs: blocks of 50 updates with a save and without, in turn.
"""

import argparse
import copy
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from lbsgd.assemble import DTYPES, device_name
from lbsgd.batchnorm import convert_batch_norm
from lbsgd.beton import open_data
from lbsgd.config import Overrides, read_json
from lbsgd.engine import initialize, memory_format, start_processes
from lbsgd.fake import FakeImages
from lbsgd.guard import Guard
from lbsgd.launch import Processes
from lbsgd.model import resnet
from lbsgd.optim import decay_groups
from lbsgd.plan import Plan
from lbsgd.saver import Saver
from lbsgd.trainer import Trainer

ROOT = Path(__file__).parent.parent


def plan_for(micro_batch, resolution, precision, num_images):
    """The recipe at a global batch of one micro batch: every iteration is one pass and one update.

    ZeRO stage 0, which is the fastest, except for fp16, which DeepSpeed trains from stage 1 on only.
    """
    config = read_json(ROOT / "ds_configs/256.json")
    if precision != "fp16":
        del config["fp16"]
        config["zero_optimization"]["stage"] = 0
    return Plan.read(config, 1, num_images, Overrides(
        global_batch=micro_batch, micro_batch=micro_batch, resolution=resolution, precision=precision))


def our_step(model, plan, open_train_data, folder="unused"):
    """The trainer's own `update`, with everything it does beside computing: schedule, totals, the check for NaN."""
    engine, _ = initialize(model, plan)
    trainer = Trainer(engine, plan, None, [], Saver(engine, Path(folder), {}, {}), Guard(Processes.from_environment(), 600))
    batches = open_train_data(engine.device).epoch(0)
    engine.train()
    return (lambda: trainer.update(batches)), trainer


def bare_step(model, plan, train_data, device):
    """What a careful engineer writes without any library: autocast, channels_last on a GPU, torch's own SGD."""
    model = model.to(device, memory_format=memory_format(device))
    convert_batch_norm(model, plan.per_worker_batch)
    params = plan.config["optimizer"]["params"]
    optimizer = torch.optim.SGD(decay_groups(model, params["weight_decay"]), lr=params["lr"], momentum=params["momentum"],
                                nesterov=params["nesterov"])
    scaler = torch.amp.GradScaler(device.type, enabled=plan.precision == "fp16")
    batches = train_data.epoch(0)
    model.train()

    def step():
        images, labels = next(batches)
        with torch.autocast(device.type, DTYPES[plan.precision], enabled=plan.precision != "fp32"):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def seconds_of(step, device):
    synchronise = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    synchronise()
    began = time.perf_counter()
    step()
    synchronise()
    return time.perf_counter() - began


def in_turn(steps, device, repeats, warm_up=3):
    """Median seconds of each step; they take turns, and who begins changes with every round."""
    for step in steps * warm_up:
        seconds_of(step, device)
    seconds = {step: [] for step in steps}
    for repeat in range(repeats):
        for step in steps if repeat % 2 else reversed(steps):
            seconds[step].append(seconds_of(step, device))
    return [statistics.median(seconds[step]) for step in steps]


def compare(table, name, micro_batch, resolution, precision, device, repeats):
    """A row: the bare loop and the trainer on the same seeded images, which are on the device already."""
    plan = plan_for(micro_batch, resolution, precision, num_images=10**6)

    def fake(device, dtype=DTYPES[plan.precision]):
        return FakeImages(plan.num_images, 1000, seed=0, global_batch=micro_batch, world_size=1, rank=0,
                          micro_batch=micro_batch, resolution=resolution, device=device, dtype=dtype,
                          channels_last=memory_format(device) is torch.channels_last)

    model = resnet(name, 1000)
    bare = bare_step(copy.deepcopy(model), plan, fake(device, torch.float32), device)
    ours, _ = our_step(model, plan, fake)
    bare_seconds, our_seconds = in_turn([bare, ours], device, repeats)
    table.add_row(f"{name}, {resolution}x{resolution}, {micro_batch} images, n = 32, {precision}, fake data",
                  f"{micro_batch / bare_seconds:.0f}", f"{micro_batch / our_seconds:.0f}",
                  f"{our_seconds / bare_seconds:.3f}", "-")


def fed_by_the_loader(table, name, micro_batch, resolution, precision, device, repeats, data_dir):
    """A row: the trainer fed with real JPEGs by the FFCV loader, and the share of the time it waited."""
    from lbsgd.loader import TrainLoader

    data = open_data(data_dir)
    plan = plan_for(micro_batch, resolution, precision, data.train.num_images)

    def load(device):
        return TrainLoader(data.train, seed=0, global_batch=micro_batch, world_size=1, rank=0, micro_batch=micro_batch,
                           resolution=resolution, threads=torch.get_num_threads(), device=device,
                           dtype=DTYPES[plan.precision], channels_last=memory_format(device) is torch.channels_last)

    step, trainer = our_step(resnet(name, data.num_classes), plan, load)
    warm_up = min(3, plan.iterations_per_epoch // 2)
    for _ in range(warm_up):
        seconds_of(step, device)
    trainer.start_window()
    began = time.perf_counter()
    count = min(repeats, plan.iterations_per_epoch - warm_up)
    for _ in range(count):
        step()
    trainer.require_numbers()  # waits for the device
    seconds = time.perf_counter() - began
    table.add_row(f"{name}, {resolution}x{resolution}, {micro_batch} images, n = 32, {precision}, {data_dir}", "-",
                  f"{count * micro_batch / seconds:.0f}", "-", f"{100 * trainer.waited / seconds:.1f} %")


def with_checkpoints(table, name, micro_batch, resolution, precision, device, blocks):
    """A row: 50 updates during which a checkpoint is gathered, written and forced to the disk, against 50 without."""
    plan = plan_for(micro_batch, resolution, precision, num_images=10**6)

    def fake(device):
        return FakeImages(plan.num_images, 1000, seed=0, global_batch=micro_batch, world_size=1, rank=0,
                          micro_batch=micro_batch, resolution=resolution, device=device, dtype=DTYPES[plan.precision],
                          channels_last=memory_format(device) is torch.channels_last)

    with tempfile.TemporaryDirectory(dir=".") as folder:
        step, trainer = our_step(resnet(name, 1000), plan, fake, folder)

        def block(save):
            if save:
                trainer.save()
            for _ in range(50):
                step()
            if save:
                trainer.saver.wait()

        plain, saving = in_turn([lambda: block(False), lambda: block(True)], device, blocks, warm_up=1)
        trainer.saver.close()
    images = 50 * micro_batch
    table.add_row(f"{name}, {resolution}x{resolution}, {micro_batch} images, n = 32, {precision}, a checkpoint every 50 iterations "
                  "(lbsgd without in place of bare PyTorch)", f"{images / plain:.0f}", f"{images / saving:.0f}",
                  f"{saving / plain:.3f}", "-")


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data_dir", help="FFCV files that the loader is to feed the trainer with")
    flags.add_argument("--repeats", type=int, default=30, help="timed iterations of each (default: 30)")
    flags.add_argument("--checkpoint_blocks", type=int, default=5, help="timed blocks of 50 iterations with a checkpoint, and "
                       "without; 0 leaves them out (default: 5)")
    arguments = flags.parse_args()
    start_processes()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = [("resnet18", 64, 64, "fp32")]
    if device.type == "cuda":
        cases += [("resnet50", 256, 224, "fp16"), ("resnet50", 256, 224, "bf16")]
    threads = f"{torch.get_num_threads()} threads"
    table = Table(title=f"images a second on {device_name()}, {threads}, median of {arguments.repeats}")
    for column in ("case", "bare PyTorch", "lbsgd", "time ratio", "waiting for data"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for case in cases:
        compare(table, *case, device, arguments.repeats)
    if arguments.data_dir:
        fed_by_the_loader(table, *cases[-1], device, arguments.repeats, arguments.data_dir)
    if arguments.checkpoint_blocks:
        with_checkpoints(table, *cases[-1], device, arguments.checkpoint_blocks)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
