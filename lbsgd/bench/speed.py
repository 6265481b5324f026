"""Measure the speed of a training step, part by part: batch norm, the whole step, torch.compile, loader, kernels.

Figures are ratios of steps that took turns in one run (`rounds`), except those of waiting and memory. The goals were
written before a GPU was available.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from torch import nn

from lbsgd.algorithm.per_worker_batch_norm import PerWorkerBatchNorm2d
from lbsgd.bench.contestants import network, our_step, plain_step, plan_for, with_batch_norm
from lbsgd.bench.feeding import data_wait
from lbsgd.bench.figure import Goal
from lbsgd.bench.memory_taken import memory_taken
from lbsgd.bench.parts import NotRun, Part, Say
from lbsgd.bench.rounds import KernelTimer, Step, Timer, compared, in_turn, seconds_of
from lbsgd.bench.sizes import BenchSettings
from lbsgd.config.plan import Plan
from lbsgd.train.engine import start_processes
from lbsgd.train.session import DTYPES
from lbsgd.units import markdown_table

NORM_GOAL = Goal("at most", 1.03)  # time of the step with n = 32 / with plain batch norm
STEP_GOAL = Goal("at least", 1.1)  # images per second of lbsgd / of plain PyTorch
COMPILED_GOAL = Goal("at least", 1.0)
LAYOUT_GOAL = Goal("at most", 1.01)
TOP = 10


def measured(
    given: BenchSettings, say: Say, steps: Mapping[str, Step], timer: Timer | None = None
) -> dict[str, list[float]]:
    """Time the steps in turn. Say if a loss is not a number, because such a step takes a different time."""
    sizes = given.sizes
    found = in_turn(steps, given.device, rounds=sizes.rounds, calls=sizes.calls, warm_up=sizes.warm_up, timer=timer)
    for name, step in steps.items():
        outcome = step()
        if isinstance(outcome, torch.Tensor) and outcome.dtype is torch.bool and not outcome:
            say(f"**{name}: its loss is not a number, so its times say nothing**")
    return found


def norm_in_the_step(given: BenchSettings, say: Say) -> None:
    """Compare the training step with batch norm over n images and the step with torch's over the micro batch.

    Everything else is the same plain loop in bf16. The implementations come one after the other, so that the results of
    the first remain if the second fails. The GPU's own time excludes the host, which may be slower than the GPU.
    """
    for how, micro_batch in product(reversed(given.sizes.implementations), given.sizes.micro_batches):
        plan = plan_for(given, micro_batch)
        steps = {"plain": plain_step(given, plan), how: plain_step(given, plan, with_batch_norm(plan, how))}
        about = f"n = {plan.per_worker_batch} by {how} / plain batch norm, micro batch {micro_batch}"
        goal = NORM_GOAL if micro_batch >= 128 else None
        say(compared(f"step, {about}", measured(given, say, steps), how, "plain", goal))
        timer = KernelTimer(whole_steps=True)
        found = measured(given, say, steps, timer)
        say(compared(f"{alone(given)} of it, {about}", found, how, "plain", goal, late_of(steps, timer)))


def alone(given: BenchSettings) -> str:
    return f"the {'GPU' if given.device == 'cuda' else 'CPU'}'s time"


def late_of(steps: Mapping[str, Step], timer: KernelTimer) -> list[str]:
    return [name for name, step in steps.items() if step in timer.late]


def norm_layers(given: BenchSettings, say: Say) -> None:
    """Compare single batch norm layers, forward and backward, in both layouts. The rule follows from this."""
    sizes, dtype = given.sizes, DTYPES[given.sizes.half]
    n, micro_batch = sizes.per_worker_batch, max(sizes.micro_batches)
    layouts = (("channels_last", torch.channels_last), ("NCHW", torch.contiguous_format))
    for how, (layout, format_of) in product(sizes.implementations, layouts):
        for channels, *shape in sizes.layers:
            x = torch.randn(micro_batch, channels, *shape, device=given.device)
            x = x.to(dtype, memory_format=format_of).requires_grad_()
            ours = PerWorkerBatchNorm2d(channels, per_worker_batch=n, implementation=how)
            layers = {"torch": nn.BatchNorm2d(channels), how: ours}
            steps = {name: pass_through(layer.to(given.device), x) for name, layer in layers.items()}
            timer = KernelTimer()
            found = measured(given, say, steps, timer)
            what = " x ".join(map(str, (micro_batch, channels, *shape)))
            name = f"layer by {how} / torch's, {layout}, {what}"
            say(compared(name, found, how, "torch", late=late_of(steps, timer)))


def pass_through(layer: nn.Module, x: torch.Tensor) -> Step:
    """Return one forward and backward of a layer, with the gradients of x, γ and β."""
    grad_y, wanted = torch.randn_like(x), (x, *layer.parameters())
    return lambda: torch.autograd.grad(layer(x), wanted, grad_y)


def whole_step(given: BenchSettings, say: Say) -> None:
    """Compare the trainer's own update with a plain PyTorch loop in autocast and channels_last, images per second.

    On a GPU lbsgd launches CUDA graphs, its default; lbsgd without them is measured as well.
    """
    start_processes()
    for micro_batch, (precision, stage) in product(reversed(given.sizes.micro_batches), given.sizes.precisions):
        whole_step_of(given, say, micro_batch, precision, stage)
        gc.collect()  # engines refer to themselves, and hold the GPU's memory until they are collected


def whole_step_of(
    given: BenchSettings, say: Say, micro_batch: int, precision: str, stage: int, tuned: bool = False
) -> None:
    plan = plan_for(given, micro_batch, precision, stage)
    steps = {"plain": plain_step(given, plan), "lbsgd": our_step(given, plan, given.sizes.blocks)}
    if given.sizes.blocks == "graphs" and not tuned:
        steps["lbsgd without graphs"] = our_step(given, plan)
    found = measured(given, say, steps)
    for name in list(found)[1:]:
        what = f"images/s, {name} / plain, {precision}, ZeRO {stage}, {micro_batch} images"
        what += ", cudnn.benchmark" if tuned else ""
        say(compared(what, found, "plain", name, STEP_GOAL if name == "lbsgd" else None))


def tuned_step(given: BenchSettings, say: Say) -> None:
    """Compare with torch.backends.cudnn.benchmark on both sides, which lets cuDNN try its algorithms at each size.

    This needs its own process, because torch keeps one algorithm per size for the whole process. lbsgd does not turn
    benchmark on, because then the algorithms, and so the bits, may differ from run to run.
    """
    start_processes()
    torch.backends.cudnn.benchmark = True
    for micro_batch, (precision, stage) in product(given.sizes.tuned_batches, given.sizes.precisions):
        whole_step_of(given, say, micro_batch, precision, stage, tuned=True)
        gc.collect()


def weights_layout(given: BenchSettings, say: Say) -> None:
    """Measure the cost of half-precision weights in NCHW, as in ZeRO's flat buffers, with images in channels_last."""
    for micro_batch in given.sizes.micro_batches:
        plan = plan_for(given, micro_batch)
        steps = {
            name: half_pass(given, plan, layout)
            for name, layout in (("NCHW", torch.contiguous_format), ("channels_last", torch.channels_last))
        }
        timer = KernelTimer(whole_steps=True)
        found = measured(given, say, steps, timer)
        about = f"weights NCHW / channels_last, {given.sizes.half}, micro batch {micro_batch}"
        name = f"{alone(given)} of forward and backward, {about}"
        say(compared(name, found, "NCHW", "channels_last", LAYOUT_GOAL, late_of(steps, timer)))


def half_pass(given: BenchSettings, plan: Plan, layout: torch.memory_format) -> Step:
    """Return a pass of a network in half precision, with weights in the given layout and images in channels_last."""
    dtype, resolution = DTYPES[given.sizes.half], given.sizes.resolution
    model: Any = with_batch_norm(plan, given.sizes.implementations[-1])(network(given, plan))  # no type for a layout
    model = model.to(given.device, dtype).to(memory_format=layout).train()
    images = torch.randn(plan.micro_batch, 3, resolution, resolution, device=given.device)
    images = images.to(dtype, memory_format=torch.channels_last)

    def step() -> None:
        model.zero_grad()
        model(images).float().square().mean().backward()

    return step


def compiled_step(given: BenchSettings, say: Say) -> None:
    """Compare both sides with torch.compile, and each side with and without it. The plain network is compiled whole."""
    start_processes()
    sizes = given.sizes
    plan = plan_for(given, sizes.compile_batch)

    def whole(model: nn.Module) -> nn.Module:
        model.compile(backend=sizes.backend, dynamic=False)
        return model

    def compare(steps: dict[str, Step], *pairs: tuple[str, str, Goal | None]) -> None:
        found = measured(given, say, steps)
        for above, below, goal in pairs:
            name = f"images/s, {above} / {below}, bf16, {sizes.compile_batch} images"
            say(compared(name, found, below, above, goal))

    plain_compiled = plain_step(given, plan, whole)
    say(f"first call of plain compiled: {seconds_of(plain_compiled, given.device, 1):.1f} s, compilation included")
    steps: dict[str, Step] = {"plain": plain_step(given, plan), "plain compiled": plain_compiled}
    compare(steps, ("plain compiled", "plain", None))
    ours_compiled = our_step(given, plan, "compiled")
    say(f"first call of lbsgd compiled: {seconds_of(ours_compiled, given.device, 1):.1f} s, compilation included")
    ours = our_step(given, plan, sizes.blocks)
    steps = {"plain compiled": plain_compiled, "lbsgd compiled": ours_compiled, "lbsgd": ours}
    pairs = ("lbsgd compiled", "plain compiled", COMPILED_GOAL), ("lbsgd", "plain compiled", None)
    compare(steps, *pairs, ("lbsgd compiled", "lbsgd", None))


def top_kernels(given: BenchSettings, say: Say) -> None:
    """List the kernels that take most of the time of the trainer's update, with their shares."""
    from torch.profiler import ProfilerActivity, profile

    start_processes()
    plan = plan_for(given, given.sizes.compile_batch)
    step = our_step(given, plan)
    for _ in range(given.sizes.warm_up):
        step()
    on_gpu = given.device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        seconds_of(step, given.device, given.sizes.calls)
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(profiled.key_averages(), key=lambda event: getattr(event, key), reverse=True)
    total = sum(getattr(event, key) for event in events)
    if not total:
        raise NotRun("the profiler saw no kernel")
    rows = [(f"{100 * getattr(e, key) / total:.1f}", str(e.count), f"`{e.key[:110]}`") for e in events[:TOP]]
    say(markdown_table(("% of the time", "calls", "kernel"), rows))


PARTS = (  # the most important first, because there may not be time for all
    Part("step", "The trainer's update against plain PyTorch", whole_step, 130),
    Part("norm", "Batch norm over n images in the training step", norm_in_the_step, 130),
    Part("loader", "Fed by the loader", data_wait, 150),
    Part("memory", "Peak memory against the estimate", memory_taken, 45),
    Part("tuned", "The update with cudnn.benchmark on both sides", tuned_step, 80),
    Part("layers", "Batch norm, layer by layer", norm_layers, 60),
    Part("profile", "Where the time goes", top_kernels, 45),
    Part("layout", "Layout of half weights", weights_layout, 60),
    Part("compile", "torch.compile on both sides", compiled_step, 240),
)
