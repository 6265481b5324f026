"""A run put together: processes, network, engine, data, reporter, trainer. The last step of `run.py`, after all checks."""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from lbsgd.config.json_file import write_json
from lbsgd.data.beton import BetonFile
from lbsgd.data.fake import FakeEval, FakeImages
from lbsgd.data.read_ahead import ReadFrom, read_whole
from lbsgd.data.share import Pixels, Share
from lbsgd.errors import CheckpointError, ConfigError, missing_ffcv
from lbsgd.processes.guard import Guard
from lbsgd.processes.launcher import from_rank_0
from lbsgd.processes.peers import Peers
from lbsgd.report.curves import curves
from lbsgd.report.run_log import LOG_NAME, RunLog, read_run
from lbsgd.train import checkpoint
from lbsgd.train.engine import gather_state, initialize, memory_format, start_processes
from lbsgd.train.progress import Progress
from lbsgd.train.reporter import Reporter
from lbsgd.train.run import FAKE_CLASSES, Run
from lbsgd.train.saver import Every, Saver
from lbsgd.train.trainer import Trainer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FAKE_VAL_IMAGES = 512
COLLECTIVE_SECONDS = 30  # longer than --hang_timeout a collective call may take, so that the guard speaks first


def train(run: Run) -> None:
    """Trains, or evaluates, as the run's flags say."""
    seconds = run.arguments.hang_timeout
    with Guard(run.processes, seconds, run.started_by) as guard:
        peers = None if run.processes.alone else Peers.meet(run.processes, seconds, guard.alive)
        if peers:
            guard.follow(peers)
            peers.agree(run.fingerprints())
        # A connection of its own: who waits for another process in torch's calls would hold up those who watch.
        processes = start_processes(seconds + COLLECTIVE_SECONDS, peers and peers.store.clone())
        from_rank_0(lambda: prepare_output(run))
        if "OMP_NUM_THREADS" not in os.environ:  # each process would take all cores, and they would fight for them
            torch.set_num_threads(processes.cores)
        engine, plan = initialize(run.network(num_classes(run), run.plan), run.plan)
        with ExitStack() as stack:
            train_data, val_data = open_loaders(run, engine.device, stack)
            trainer = Trainer(engine, plan, train_data, val_data, open_saver(run, engine, stack), guard)
            resumed = run.arguments.resume or run.arguments.evaluate_only
            if resumed and from_rank_0(lambda: bool(checkpoint.newest(trainer.saver.folder))):
                trainer.restore()
            if run.arguments.evaluate_only:
                return print_evaluation(run, trainer)
            from_rank_0(lambda: open_reporter(run, trainer, stack))
            trainer.train(run.last_iteration)
            finish(run, trainer)


def prepare_output(run: Run) -> None:
    """Refuses to write over a run, or where nothing can be written, and to evaluate where there is no checkpoint. Rank 0
    alone looks, for the other hosts may not have the folder."""
    resume, evaluate, folder = run.arguments.resume, run.arguments.evaluate_only, run.output_dir / "checkpoints"
    newest = checkpoint.newest(folder)
    if evaluate and not newest:
        raise CheckpointError(f"no complete checkpoint in {folder} to evaluate; train first, or name its --output_dir")
    if not (resume or evaluate) and (newest or (run.output_dir / LOG_NAME).exists()):
        raise ConfigError(
            f"{run.output_dir} already holds a run: continue it with --resume or choose another --output_dir"
        )
    if not evaluate:
        require_writable(run.output_dir)
        write_json(
            run.output_dir / f"{run.plan.name}.json", run.plan.config
        )  # with every override in it, to be fed back
    if resume and not newest:
        print(f"no complete checkpoint in {folder}: starting anew", flush=True)


def require_writable(folder: Path) -> None:
    """Raises ConfigError where the output folder cannot be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"cannot write into the output folder {folder} ({error.strerror}); choose another --output_dir"
        ) from None


def num_classes(run: Run) -> int:
    return run.data.num_classes if run.data else FAKE_CLASSES


def open_loaders(run: Run, device: torch.device, stack: ExitStack):
    """Training and validation images for this process, on its device, in the model's precision and memory format."""
    plan, processes = run.plan, run.processes
    pixels = Pixels(
        resolution=plan.recipe.augmentation.resolution,
        device=device,
        dtype=DTYPES[plan.precision],
        channels_last=memory_format(device) is torch.channels_last,
    )
    share = dict(share=Share(processes.rank, plan.world_size), pixels=pixels)
    part = dict(seed=plan.recipe.seed, global_batch=plan.global_batch, micro_batch=plan.micro_batch)
    if run.data is None:
        return (
            FakeImages(plan.num_images, FAKE_CLASSES, **part, **share),
            FakeEval(FAKE_VAL_IMAGES, FAKE_CLASSES, seed=plan.recipe.seed, batch=plan.micro_batch, **share),
        )
    try:
        from lbsgd.data.loaders import EvalLoader, TrainLoader  # imports FFCV: four seconds, not needed for fake data
    except ImportError as error:
        raise missing_ffcv(error) from error
    threads = run.arguments.loader_threads or processes.cores
    sources = [choose_source(run, file) for file in (run.data.train, run.data.val)]
    augmentation = dict(crop_scale=tuple(plan.recipe.augmentation.crop_scale), flip=plan.recipe.augmentation.flip)
    return (
        stack.enter_context(
            closing(
                TrainLoader(
                    run.data.train,
                    threads=threads,
                    from_disk=sources[0].kind == "disk",
                    **part,
                    **augmentation,
                    **share,
                )
            )
        ),
        stack.enter_context(
            closing(
                EvalLoader(
                    run.data.val, threads=threads, from_disk=sources[1].kind == "disk", batch=plan.micro_batch, **share
                )
            )
        ),
    )


def choose_source(run: Run, file: BetonFile) -> ReadFrom:
    """Where the images of a file come from, printed; with --in_memory it is read once by a process of each host."""
    source = ReadFrom.choose(file.path, run.arguments.in_memory)
    if run.speaks:
        print(f"{file.path.stem:15}from {source.kind}: {source.reason}", flush=True)
    if source.kind == "memory" and run.processes.local_rank == 0:
        read_whole(file.path)
    return source


def identity(run: Run, engine) -> dict[str, Any]:
    """What a checkpoint to resume must agree in: recipe, network and data."""
    network = {name: list(tensor.shape) for name, tensor in engine.module.state_dict().items()}
    return {**run.plan.identity(), "network": network, "data": run.data.fingerprint if run.data else "fake"}


def open_saver(run: Run, engine, stack: ExitStack) -> Saver:
    every = Every(*run.arguments.checkpoint_every) if run.arguments.checkpoint_every else Every()
    saver = Saver(engine, run.output_dir / "checkpoints", identity(run, engine), {"plan": run.plan.as_dict()}, every)
    return stack.enter_context(closing(saver))


def open_reporter(run: Run, trainer: Trainer, stack: ExitStack) -> None:
    """Gives the trainer of rank 0 its log and its screen."""
    described = {
        "model": run.model,
        **run.plan.as_dict(),
        "environment": {**run.environment(), "device": device_name(), "threads": torch.get_num_threads()},
    }
    log = RunLog(run.output_dir, described, trainer.iteration if run.arguments.resume else None)
    progress = Progress(run.last_iteration, run.plan.iterations_per_epoch, trainer.iteration)
    threads = f"{run.arguments.loader_threads or run.processes.cores} loader threads a process"
    trainer.reporter = stack.enter_context(Reporter(log, progress, threads))
    trainer.saver.say = progress.say


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def print_evaluation(run: Run, trainer: Trainer) -> None:
    epoch = trainer.iteration // run.plan.iterations_per_epoch
    record = trainer.evaluate(epoch)
    if run.speaks:
        print(
            f"iteration {trainer.iteration}: top-1 error {record['val_top1_error_pct']:.2f} %, top-5 error "
            f"{record['val_top5_error_pct']:.2f} % on {record['val_images']} images"
        )


def finish(run: Run, trainer: Trainer) -> None:
    """Exports the weights, draws the curves and says where everything is."""
    state = gather_state(trainer.engine, keep=run.speaks)
    if not run.speaks:
        return
    trainer.saver.wait()
    reporter, folder = trainer.reporter, run.output_dir
    checkpoint.export_weights(folder / "weights.pt", state.weights)
    if reporter.log.epochs:
        result = reporter.log.result()
        curves([read_run(folder)], folder / "curves.png")
        reporter.progress.say(
            f"top-1 error    {result['val_top1_error_pct']:.2f} %, median of the last "
            f"{min(5, len(reporter.log.epochs))} epochs"
        )
        reporter.progress.say(f"curves         {folder / 'curves.png'}")
    reporter.progress.say(f"log            {reporter.log.path}")
    reporter.progress.say(f"checkpoint     {checkpoint.newest(trainer.saver.folder)}")
    reporter.progress.say(f"weights        {folder / 'weights.pt'} (float32 state_dict)")
