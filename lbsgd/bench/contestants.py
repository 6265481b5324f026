"""The training steps that the bench compares: lbsgd's own update, and a plain PyTorch loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lbsgd.algorithm.batch_norm import convert_batch_norm
from lbsgd.algorithm.fused_blocks import fuse_blocks
from lbsgd.algorithm.sgd import decay_groups
from lbsgd.bench.sizes import BenchSettings, Blocks
from lbsgd.config.generate import generate
from lbsgd.config.overrides import Overrides
from lbsgd.config.plan import Plan
from lbsgd.data.fake import FakeImages
from lbsgd.processes.environment import Processes
from lbsgd.processes.guard import Guard
from lbsgd.train.compiled import compile_blocks
from lbsgd.train.device_rules import LAYOUT
from lbsgd.train.engine import initialize
from lbsgd.train.graphs import graph_blocks
from lbsgd.train.images import Images, cut_of
from lbsgd.train.saver import Saver
from lbsgd.train.session import DTYPES, pixel_form
from lbsgd.train.trainer import NEVER, Trainer

NUM_CLASSES, NUM_IMAGES = 1000, 10**6  # enough images that no epoch ends
FP16_SCALE_POWER = 10  # the first update must not overflow: torch 2.11's fused SGD would keep unwritten momentum
Change = Callable[[nn.Module], nn.Module]
UpdateStep = Callable[[], torch.Tensor]  # makes an update, and returns whether the loss is a number


def plan_for(
    given: BenchSettings,
    micro_batch: int,
    precision: str = "bf16",
    stage: int = 0,
    *,
    passes: int = 1,
    num_images: int = NUM_IMAGES,
    more: tuple[str, ...] = (),
) -> Plan:
    """Return the recipe without warmup, with `passes` of micro_batch images per update. `more` sets further keys."""
    sizes = given.sizes
    settings = (
        'lbsgd.warmup={"kind": "none", "epochs": 0}',
        f"lbsgd.batch_norm.per_worker_batch={sizes.per_worker_batch}",
        f"lbsgd.augmentation.resolution={sizes.resolution}",
        *((f"fp16.initial_scale_power={FP16_SCALE_POWER}",) if precision == "fp16" else ()),
        *more,
    )
    overrides = Overrides(
        passes * micro_batch,
        micro_batch,
        precision=precision,
        zero_stage=stage,
        num_images=num_images,
        settings=settings,
    )
    return Plan.read(generate(overrides, gpus=1), 1, num_images)


def network(given: BenchSettings, plan: Plan) -> nn.Module:
    model: nn.Module = given.task.network(NUM_CLASSES, plan)
    return model


def fake_images(plan: Plan, device: Any, dtype: torch.dtype | None = None) -> FakeImages:
    """Return seeded images that are already on the device, by default in the plan's precision."""
    pixels = pixel_form(plan, torch.device(device))
    pixels = replace(pixels, device=device, dtype=dtype or pixels.dtype)
    return FakeImages(plan.num_images, NUM_CLASSES, cut_of(plan, Processes.from_environment()), pixels)


def our_trainer(given: BenchSettings, plan: Plan, blocks: Blocks = "as they are") -> Trainer:
    """Return the trainer of a recipe, without a log and without images."""
    engine, _ = initialize(network(given, plan), plan)
    if blocks == "compiled":
        compile_blocks(engine.module, given.sizes.backend)
    elif blocks == "graphs":
        graph_blocks(engine.module, plan.accumulation_steps)
    guard, saver = Guard(Processes.from_environment(), 600), Saver(engine, given.folder, {}, {})
    engine.train()
    return Trainer(engine, plan, given.task, Images(None, None), saver, guard)  # type: ignore[arg-type]


def our_step(given: BenchSettings, plan: Plan, blocks: Blocks = "as they are") -> UpdateStep:
    """Return the trainer's own update, including schedule, totals and the check for NaN."""
    return step_of(our_trainer(given, plan, blocks), plan)


def step_of(trainer: Trainer, plan: Plan) -> UpdateStep:
    """Return the update of a trainer on images that are already on the device."""
    batches = fake_images(plan, trainer.engine.device).epoch(0)

    def step() -> torch.Tensor:
        trainer.update(batches)
        return trainer.first_bad == NEVER

    return step


def with_batch_norm(plan: Plan, implementation: Any) -> Change:
    """Return a function that gives a network batch norm over n images, as `lbsgd.initialize` does."""

    def change(model: nn.Module) -> nn.Module:
        convert_batch_norm(model, plan.per_worker_batch, implementation=implementation)
        return fuse_blocks(model) if implementation == "triton" else model

    return change


def plain_step(given: BenchSettings, plan: Plan, change: Change = lambda model: model) -> UpdateStep:
    """Return the update that a careful engineer would write: autocast, channels_last on a GPU, torch's fused SGD.

    change: takes the network before training, and returns the network to train.
    """
    device = given.device
    model: Any = change(network(given, plan))  # torch types no memory_format
    model = model.to(device, memory_format=LAYOUT)
    params = dict(plan.config["optimizer"]["params"])
    groups = decay_groups(model, params.pop("weight_decay"))
    optimizer = torch.optim.SGD(groups, **params, fused=True)
    batches = fake_images(plan, device, torch.float32).epoch(0)
    model.train()
    return autocast_step(model, optimizer, batches, plan.precision, device)


def autocast_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[Any], precision: str, device_type: str
) -> UpdateStep:
    """Return PyTorch's usual update on one batch: cross-entropy in autocast, and a scaled loss in fp16."""
    scaler = torch.amp.GradScaler(device_type, init_scale=2.0**FP16_SCALE_POWER, enabled=precision == "fp16")

    def step() -> torch.Tensor:
        images, labels = next(batches)
        with torch.autocast(device_type, DTYPES[precision], enabled=precision != "fp32"):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.isfinite()

    return step


def without_end(batches: Callable[[int], Iterator[Any]]) -> Iterator[Any]:
    """Yield the batches of one epoch after the other."""
    epoch = 0
    while True:
        yield from batches(epoch)
        epoch += 1
