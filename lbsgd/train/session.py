"""A run from the meeting of its processes to its results. Everything is built here, in order, and passed on."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from functools import partial
from typing import Any

import psutil
import torch

from lbsgd.config.plan import Plan
from lbsgd.data.share import Pixels
from lbsgd.errors import DataError
from lbsgd.output import say
from lbsgd.processes.ending import from_rank_0
from lbsgd.processes.environment import Processes
from lbsgd.processes.guard import Guard
from lbsgd.processes.peers import Peers
from lbsgd.processes.stopwatch import Stopwatch
from lbsgd.processes.surroundings import require_devices
from lbsgd.report.lines import warn
from lbsgd.report.run_log import RunLog, read_run
from lbsgd.train import checkpoint
from lbsgd.train.compiled import compile_blocks
from lbsgd.train.device_rules import LAYOUT, emulated_bf16, repeat_bits
from lbsgd.train.engine import initialize, start_processes
from lbsgd.train.engine_state import gather_state
from lbsgd.train.facts import KIND_OF_DEVICE, unused_gpu
from lbsgd.train.graphs import GraphChoice, choose_graphs, graph_blocks
from lbsgd.train.header import header_of, say_what_runs
from lbsgd.train.identity import MODEL
from lbsgd.train.live_page import LivePage
from lbsgd.train.progress import Progress
from lbsgd.train.random_states import seed_random_numbers
from lbsgd.train.reporter import Reporter
from lbsgd.train.run import WEIGHTS_NAME, Run, begin_output, only_writer, prepare_output
from lbsgd.train.saver import Saver
from lbsgd.train.trainer import Trainer
from lbsgd.train.weights import put_weights, weights_in
from lbsgd.units import counted

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COLLECTIVE_SECONDS = 30  # a collective call may exceed --hang_timeout by this, so that the guard speaks first


def train(
    run: Run,
    processes: Processes,
    launchers: Sequence[psutil.Process],
    hang_timeout: float,
    facts: Mapping[str, str],
    stopwatch: Stopwatch,
) -> None:
    """Train or evaluate on all processes. Raises LbsgdError for whatever ends the run early.

    launchers       the launcher processes that started this one, nearest first
    hang_timeout    seconds without progress after which the run ends
    facts           fingerprints of code, configuration and data, by name, which all processes must have in common
    stopwatch       of the start, from the command to the first update
    """
    with Guard(processes, hang_timeout, launchers) as guard, ExitStack() as stack:
        if run.deterministic:
            repeat_bits()
        meet(processes, facts, guard)
        stopwatch.lap("meeting")
        if processes.is_rank_0 and (reason := unused_gpu()):
            warn(reason)
        from_rank_0(lambda: open_output(run, guard, stack))
        limit_threads(processes)
        plan, seed = run.plan, run.plan.recipe.seed
        seed_random_numbers(seed)  # a network may draw its weights without `seeded`
        engine, graphs = build_engine(run)
        stopwatch.lap("engine")
        if processes.is_rank_0 and (reason := emulated_bf16(plan, engine.device)):
            warn(reason)
        progress = Progress(run.last_iteration, plan.iterations_per_epoch, plan.global_batch, run.task.judged_by)
        saver = stack.enter_context(closing(open_saver(run, engine, progress)))
        images = run.images.open(plan, processes, pixel_form(plan, engine.device), stack)
        stopwatch.lap("loaders")
        reached = None
        seed_random_numbers(seed, processes.rank, 0)
        if begins_with_checkpoint(run):
            reached = saver.restore(to_train=not run.evaluate_only)
            stopwatch.lap("checkpoint")
        if run.evaluate_only:
            evaluate_only(run, Trainer(engine, plan, run.task, images, saver, guard, reached=reached))
            return
        reporter = open_reporter(run, engine, progress, stopwatch, graphs)
        stack.enter_context(reporter or nullcontext())
        trainer = Trainer(engine, plan, run.task, images, saver, guard, reporter, reached)
        trainer.train(run.last_iteration, run.evaluate_every)
        export(run, engine, saver, reporter)
        if engine.aggregation:
            engine.aggregation.close()  # Python aborts if it ends while a thread is in torch's C++ code


def open_output(run: Run, guard: Guard, stack: ExitStack) -> None:
    """Take the output folder until the stack ends, and check that the run may go there. Only rank 0 does this."""
    if not run.evaluate_only:
        alive = partial(guard.alive, "the wait for the folder")
        most = guard.hang_timeout / 2  # the other processes wait for rank 0 and must not take it for lost
        stack.enter_context(only_writer(run.output_dir, alive, most))
    prepare_output(run, checkpoint.newest(run.checkpoints))


def meet(processes: Processes, facts: Mapping[str, str], guard: Guard) -> None:
    """Wait for the other processes, compare facts with them, and join torch's group."""
    peers = None
    if not processes.alone:
        peers = Peers.meet(processes, guard.hang_timeout, guard.alive)
        guard.follow(peers)
        peers.agree(dict(facts))
        if facts[KIND_OF_DEVICE] == "cpu":  # the processes communicate through gloo
            peers.require_address()
    require_devices(facts[KIND_OF_DEVICE])
    # Another connection, because torch's calls wait for other processes and would hold up the watching threads.
    start_processes(guard.hang_timeout + COLLECTIVE_SECONDS, peers.own_connection() if peers else None)


def limit_threads(processes: Processes) -> None:
    """Give this process its share of the cores. Otherwise all processes would compete for all cores."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(processes.cores)


def build_engine(run: Run) -> tuple[Any, GraphChoice]:
    """Return the engine, with its blocks compiled or graphed as the run asks, and the choice of graphs."""
    engine, plan = initialize(run.task.network(run.images.num_classes, run.plan), run.plan)
    if run.compiled:
        compile_blocks(engine.module)
    graphs = choose_graphs(run, engine)
    if graphs.are_on:
        graph_blocks(engine.module, plan.accumulation_steps)
    return engine, graphs


def pixel_form(plan: Plan, device: torch.device) -> Pixels:
    """Return the form in which the network takes its images."""
    return Pixels(
        resolution=plan.recipe.augmentation.resolution,
        device=device,
        dtype=DTYPES[plan.precision],
        memory_format=LAYOUT,
    )


def open_saver(run: Run, engine, progress: Progress) -> Saver:
    """Open the run's checkpoints. To be resumed, one must match the run. To be evaluated, only its network must."""
    network = {name: list(tensor.shape) for name, tensor in engine.module.state_dict().items()}
    identity: dict[str, Any] = {
        MODEL: run.task.name,
        "network": network,
        "windows": windows_of(engine.module),
    }
    if not run.evaluate_only:  # a network may be evaluated on any data, at any size, in any precision
        images = {"data": run.images.fingerprint, "decoder": run.images.decoder}
        identity |= {**run.plan.identity(), "precision": run.plan.precision, **images}
    described = {"plan": run.plan.as_dict(), "script": run.script}
    return Saver(engine, run.checkpoints, identity, described, run.every, progress.say)


def begins_with_checkpoint(run: Run) -> bool:
    """Whether the run resumes or evaluates a checkpoint. All processes must call this."""
    wanted = not run.weights and (run.resume or run.evaluate_only)
    return wanted and from_rank_0(lambda: bool(checkpoint.newest(run.checkpoints)))


def evaluate_only(run: Run, trainer: Trainer) -> None:
    """Evaluate the weights that the run names, or the trainer's checkpoint, and print the result on rank 0.

    Raises DataError if weights or results are not numbers, because an AP of 0 would pass for a result.
    """
    if run.weights:
        put_weights(trainer.engine.module, from_rank_0(partial(weights_in, run.weights)), run.weights)
    what = run.weights or f"iteration {trainer.iteration}"
    if broken := trainer.saver.broken_weights():
        raise DataError(f"{what}: the weights {broken} are not numbers; evaluate weights from before that")
    record = trainer.evaluate(trainer.iteration // trainer.plan.iterations_per_epoch)
    if no_number := [key for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)]:
        raise DataError(
            f"{what}: {no_number[0]} is not a number in {trainer.plan.precision}, so nothing else is a result; "
            "evaluate in fp32, or other weights"
        )
    if torch.distributed.get_rank() == 0:
        judged = (f"{measure.name} {measure.words(record[measure.key])}" for measure in trainer.task.judged_by)
        among = run.images.errors and f", {run.images.errors}"
        say(f"{what}: {', '.join(judged)} on {record.get('val_images', 'the')} images of {run.images.place}{among}")


def windows_of(network: torch.nn.Module) -> dict[str, str]:
    """Return how each convolution and each pooling moves over its input, because no weight shows it."""
    keys = ("kernel_size", "stride", "padding", "dilation")
    return {
        name: ", ".join(f"{key} {getattr(part, key)}" for key in keys if hasattr(part, key))
        for name, part in network.named_modules()
        if hasattr(part, "stride")
    }


def open_reporter(run: Run, engine, progress: Progress, stopwatch: Stopwatch, graphs: GraphChoice) -> Reporter | None:
    """Return rank 0's reporter, and None on other processes. An error on rank 0 ends them all."""
    opened: list[Reporter] = []  # rank 0's, which is not sent to the other processes
    from_rank_0(lambda: opened.append(reporter_of(run, engine, progress, stopwatch, graphs)))
    return opened[0] if opened else None


def reporter_of(run: Run, engine, progress: Progress, stopwatch: Stopwatch, graphs: GraphChoice) -> Reporter:
    """Begin the output, open log, screen and page, and say what runs."""
    header = header_of(run, engine, graphs)
    log = RunLog(run.output_dir, header, engine.global_steps if run.resume else None, partial(begin_output, run))
    progress.begin(engine.global_steps)
    say_what_runs(progress, header)
    page = LivePage(run.output_dir, header, run.baseline)
    if lost := log.lost_epochs:
        begun = f"{counted(len(lost), 'epoch')} of those done before, from epoch {lost[0]} on"
        progress.say(f"warning: {log.path} lacks {begun}; its tables and curves lack them, too")
    if line := page.too_short(run.last_iteration / run.plan.iterations_per_epoch):
        progress.say(f"warning: {line}")
    page.take_up(read_run(log.path))  # if the run is resumed
    page.write(log.epochs)
    return Reporter(log, progress, engine, run.images.waiting_advice, page, stopwatch)


def export(run: Run, engine, saver: Saver, reporter: Reporter | None) -> None:
    """Write the weights and let the reporter conclude. All processes must call this."""
    state = gather_state(engine, keep=reporter is not None)

    def conclude() -> None:
        assert reporter is not None
        saver.wait()
        weights = run.output_dir / WEIGHTS_NAME
        checkpoint.export_weights(weights, state.weights)
        files = {
            "checkpoint": saver.newest_written() or "none could be written",
            "weights": f"{weights} (float32 state_dict)",
        }
        reporter.conclude(run.task.judged_by, files)

    from_rank_0(conclude)  # a process that ended earlier could lose what NCCL has only queued for rank 0
