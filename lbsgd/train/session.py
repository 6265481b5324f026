"""A run from the meeting of its processes to its results: everything is built here, in order, and handed on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import psutil
import torch

from lbsgd.config.memory import NETWORKS, memory
from lbsgd.config.plan import Plan
from lbsgd.data.share import Pixels
from lbsgd.processes.ending import from_rank_0
from lbsgd.processes.environment import Processes
from lbsgd.processes.guard import Guard
from lbsgd.processes.peers import Peers
from lbsgd.processes.start import Stopwatch
from lbsgd.report.measure import described as measures_described
from lbsgd.report.run_log import RunLog, read_run
from lbsgd.train import checkpoint
from lbsgd.train.aggregation.aggregation import described
from lbsgd.train.compiled import compile_blocks
from lbsgd.train.device_rules import LAYOUT, norm_implementation
from lbsgd.train.engine import initialize, start_processes
from lbsgd.train.engine_state import gather_state
from lbsgd.train.facts import environment
from lbsgd.train.graphs import by_rule, graph_blocks
from lbsgd.train.live_page import LivePage
from lbsgd.train.progress import Progress
from lbsgd.train.reporter import Reporter, Silence
from lbsgd.train.run import WEIGHTS_NAME, Run, begin_output, prepare_output
from lbsgd.train.saver import Saver
from lbsgd.train.trainer import Trainer
from lbsgd.train.weights import put_weights, weights_in

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COLLECTIVE_SECONDS = 30  # longer than --hang_timeout a collective call may take, so that the guard speaks first


@dataclass(frozen=True)
class Launch:
    """How this process was started, and what it must have in common with the others.

    launchers       the processes that started this one, the nearest first
    hang_timeout    seconds without progress after which the run ends
    facts           fingerprints of code, configuration and data, by name
    stopwatch       of the start, from the command to the first update
    """

    processes: Processes
    launchers: Sequence[psutil.Process]
    hang_timeout: float
    facts: Mapping[str, str]
    stopwatch: Stopwatch = field(default_factory=Stopwatch)


def train(run: Run, launch: Launch) -> None:
    """Train, or evaluate, on all processes; raise LbsgdError for what ends the run early."""
    with Guard(launch.processes, launch.hang_timeout, launch.launchers) as guard, ExitStack() as stack:
        processes = meet(launch, guard)
        launch.stopwatch.lap("meeting")
        from_rank_0(lambda: prepare_output(run, checkpoint.newest(run.checkpoints)))
        limit_threads(processes)
        engine, plan = initialize(run.task.network(run.images.num_classes, run.plan), run.plan)
        if run.compiled:
            compile_blocks(engine.module)
        graphs = graphs_of(run, engine)
        if graphs.are_on:
            graph_blocks(engine.module, plan.accumulation_steps)
        launch.stopwatch.lap("engine")
        progress = Progress(
            run.last_iteration,
            plan.iterations_per_epoch,
            images_per_iteration=plan.global_batch,
            judged_by=run.task.judged_by,
        )
        saver = stack.enter_context(closing(open_saver(run, engine, progress)))
        reached = None
        wanted = not run.weights and (run.resume or run.evaluate_only)
        goes_on = wanted and from_rank_0(lambda: bool(checkpoint.newest(run.checkpoints)))
        if goes_on:
            saver.read_newest()  # while the data opens
        images = run.images.open(plan, processes, pixels_of(plan, engine.device), stack)
        launch.stopwatch.lap("loaders")
        if goes_on:
            reached = saver.restore()
            launch.stopwatch.lap("checkpoint")
        if run.evaluate_only:
            if run.weights:
                put_weights(engine.module, from_rank_0(partial(weights_in, run.weights)), run.weights)
            print_evaluation(Trainer(engine, plan, run.task, images, saver, guard, Silence(), reached), run)
            return
        from_rank_0(lambda: begin_output(run))
        reporter = open_reporter(run, engine, progress, launch.stopwatch, graphs)
        stack.enter_context(reporter)
        trainer = Trainer(engine, plan, run.task, images, saver, guard, reporter, reached)
        trainer.train(run.last_iteration, run.evaluate_every)
        export(run, engine, saver, reporter)
        if engine.aggregation:
            engine.aggregation.close()  # Python aborts if it ends while a thread is in torch's C++ code


def meet(launch: Launch, guard: Guard) -> Processes:
    """Wait for the other processes, compare facts with them, and join torch's group."""
    peers = None
    if not launch.processes.alone:
        peers = Peers.meet(launch.processes, launch.hang_timeout, guard.alive)
        guard.follow(peers)
        peers.agree(dict(launch.facts))
    # A connection of its own: a wait for another process in torch's calls would hold up the threads that watch.
    return start_processes(launch.hang_timeout + COLLECTIVE_SECONDS, peers.own_connection() if peers else None)


def limit_threads(processes: Processes) -> None:
    """Give this process its share of the cores; otherwise each would take all of them, and they would fight."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(processes.cores)


def pixels_of(plan: Plan, device: torch.device) -> Pixels:
    """Return the form in which the network takes its images."""
    return Pixels(
        resolution=plan.recipe.augmentation.resolution,
        device=device,
        dtype=DTYPES[plan.precision],
        memory_format=LAYOUT,
    )


def open_saver(run: Run, engine, progress: Progress) -> Saver:
    """Open the run's checkpoints. One to resume must agree with the run; one to evaluate, in the network alone."""
    network = {name: list(tensor.shape) for name, tensor in engine.module.state_dict().items()}
    identity: dict[str, Any] = {"network": network}
    if not run.evaluate_only:  # a network may be evaluated on any data, at any size, in any precision
        images = {"data": run.images.fingerprint, "decoder": run.images.decoder}
        identity |= {**run.plan.identity(), "precision": run.plan.precision, **images}
    return Saver(engine, run.checkpoints, identity, {"plan": run.plan.as_dict()}, run.every, progress.say)


def open_reporter(run: Run, engine, progress: Progress, stopwatch: Stopwatch, graphs: CudaGraphs) -> Reporter | Silence:
    """Open log and screen on rank 0; an error there ends all processes."""
    opened: list[Reporter] = []

    def open_log() -> None:
        host = {**environment(run.images.place), **of_the_device(engine.device)}
        aggregation = described(run.plan, engine)
        norm = norm_described(run, engine.device)
        about = {
            **({"started_from": run.started_from} if run.started_from else {}),
            "model": run.task.name,
            "judged_by": measures_described(run.task.judged_by),
            **run.plan.as_dict(),
            "data": run.images.fingerprint,
            **({"decoder": run.images.decoder} if run.images.decoder else {}),
            "aggregation": aggregation,
            "batch_norm": norm,
            **({"compiled": "each residual block"} if run.compiled else {}),
            **({"cuda_graphs": graphs.words} if graphs.words else {}),
            **estimated_memory(run, engine.device, graphs.are_on),
            "environment": host,
        }
        log = RunLog(run.output_dir, about, engine.global_steps if run.resume else None)
        progress.begin(engine.global_steps)
        progress.say(f"data           {run.images.place}")
        if run.images.decoder:
            progress.say(f"decoder        {run.images.decoder}")
        progress.say(f"aggregation    {aggregation}")
        progress.say(f"batch norm     {norm}")
        if graphs.words:
            progress.say(f"CUDA graphs    {graphs.words}")
        page = LivePage(run.output_dir, about, run.baseline)
        page.take_up(read_run(log.path))  # of a run that is resumed
        page.write(log.epochs)
        opened.append(Reporter(log, progress, engine, run.images.waiting_advice, page, stopwatch))

    from_rank_0(open_log)
    return opened[0] if opened else Silence()


def of_the_device(device: torch.device) -> dict[str, Any]:
    """Return for the log what computes; on a GPU also where torch multiplies float32 as TF32."""
    found: dict[str, Any] = {"device": device_name(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        found["tf32"] = {
            "convolutions": torch.backends.cudnn.allow_tf32,
            "products": torch.backends.cuda.matmul.allow_tf32,
        }
    return found


def norm_described(run: Run, device: torch.device) -> str:
    """Tell what computes batch norm in training, and why."""
    implementation, reason = norm_implementation(run.plan, device)
    outside = " outside of compiled blocks" if run.compiled and implementation == "triton" else ""
    return f"{implementation}{outside}, by {reason}"


class CudaGraphs(NamedTuple):
    are_on: bool
    words: str  # with the reason; none where there is no GPU


def graphs_of(run: Run, engine) -> CudaGraphs:
    """Return whether training runs as CUDA graphs."""
    graphed, reason = run.graphed, "the flag"
    if graphed is None:
        graphed, reason = by_rule(engine.module, run.plan.world_size, engine.device, run.compiled)
    words = f"{'each residual block' if graphed else 'none'}, by {reason}"
    return CudaGraphs(graphed, words if engine.device.type == "cuda" else "")


def estimated_memory(run: Run, device: torch.device, graphed: bool) -> dict[str, int]:
    """Return for the log what `lbsgd plan` says of a GPU's memory, where it knows the network."""
    size, plan = NETWORKS.get(run.task.name), run.plan
    if size is None or device.type != "cuda":
        return {}
    return {"memory_estimate_bytes": memory(plan, size, plan.zero_stage, graphed).total}


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def print_evaluation(trainer: Trainer, run: Run) -> None:
    """Evaluate what the trainer has, weights or a checkpoint, and print what it is judged by on rank 0."""
    record = trainer.evaluate(trainer.iteration // trainer.plan.iterations_per_epoch)
    if torch.distributed.get_rank() == 0:
        judged = (f"{measure.name} {measure.words(record[measure.key])}" for measure in trainer.task.judged_by)
        what = run.weights or f"iteration {trainer.iteration}"
        print(f"{what}: {', '.join(judged)} on {record['val_images']} images of {run.images.place}")


def export(run: Run, engine, saver: Saver, reporter: Reporter | Silence) -> None:
    """Write the weights and let the reporter conclude; all processes must call it."""
    state = gather_state(engine, keep=torch.distributed.get_rank() == 0)

    def conclude() -> None:
        saver.wait()
        weights = run.output_dir / WEIGHTS_NAME
        checkpoint.export_weights(weights, state.weights)
        files = {"checkpoint": checkpoint.newest(run.checkpoints), "weights": f"{weights} (float32 state_dict)"}
        reporter.conclude(run.task.judged_by, files)

    from_rank_0(conclude)  # a process that ended before could take along what NCCL has only queued for rank 0
