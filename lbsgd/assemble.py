"""A run put together: processes, network, engine, data, reporter, trainer. The last step of `run.py`, after all checks."""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist

from lbsgd import checkpoint
from lbsgd.engine import gather_state, initialize, memory_format, start_processes
from lbsgd.errors import missing_ffcv
from lbsgd.fake import FakeEval, FakeImages
from lbsgd.progress import Progress
from lbsgd.report import curves
from lbsgd.run import FAKE_CLASSES, Run
from lbsgd.runlog import RunLog, read_run
from lbsgd.trainer import Reporter, Trainer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FAKE_VAL_IMAGES = 512


def train(run: Run, resumed: Optional[Path]) -> None:
    """Trains, or evaluates, as the run's flags say. `resumed` is the checkpoint to go on from; rank 0 alone knows it."""
    processes = start_processes()
    if "OMP_NUM_THREADS" not in os.environ:  # each process would take all cores, and they would fight for them
        torch.set_num_threads(max(1, os.cpu_count() // processes.local_world_size))
    engine, plan = initialize(run.network(num_classes(run), run.plan), run.plan)
    resumed = from_rank_0(resumed)
    with ExitStack() as stack:
        train_data, val_data = open_loaders(run, engine.device, stack)
        trainer = Trainer(engine, plan, train_data, val_data, run.output_dir / "checkpoints", identity(run, engine))
        if resumed:
            trainer.restore(resumed)
        if run.arguments.evaluate_only:
            return print_evaluation(run, trainer)
        if run.speaks:
            trainer.reporter = stack.enter_context(open_reporter(run, trainer.iteration, resuming=run.arguments.resume))
        trainer.train(run.last_iteration)
        finish(run, trainer)


def num_classes(run: Run) -> int:
    return run.data.num_classes if run.data else FAKE_CLASSES


def from_rank_0(value: Any) -> Any:
    """What rank 0 holds, on every process."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def open_loaders(run: Run, device: torch.device, stack: ExitStack):
    """Training and validation images for this process, on its device, in the model's precision and memory format."""
    plan, processes = run.plan, run.processes
    share = dict(world_size=plan.world_size, rank=processes.rank, resolution=plan.recipe.augmentation.resolution,
                 device=device, dtype=DTYPES[plan.precision],
                 channels_last=memory_format(device) is torch.channels_last)
    part = dict(seed=plan.recipe.seed, global_batch=plan.global_batch, micro_batch=plan.micro_batch)
    if run.data is None:
        return (FakeImages(plan.num_images, FAKE_CLASSES, **part, **share),
                FakeEval(FAKE_VAL_IMAGES, FAKE_CLASSES, seed=plan.recipe.seed, batch=plan.micro_batch, **share))
    try:
        from lbsgd.loader import EvalLoader, TrainLoader  # imports FFCV: four seconds, and not needed for fake data
    except ImportError as error:
        raise missing_ffcv(error) from error
    threads = run.arguments.loader_threads or max(1, os.cpu_count() // processes.local_world_size)
    augmentation = dict(crop_scale=tuple(plan.recipe.augmentation.crop_scale), flip=plan.recipe.augmentation.flip)
    return (stack.enter_context(closing(TrainLoader(run.data.train, threads=threads, **part, **augmentation, **share))),
            stack.enter_context(closing(EvalLoader(run.data.val, threads=threads, batch=plan.micro_batch, **share))))


def identity(run: Run, engine) -> dict[str, Any]:
    """What a checkpoint to resume must agree in: recipe, network and data."""
    network = {name: list(tensor.shape) for name, tensor in engine.module.state_dict().items()}
    return {**run.plan.identity(), "network": network, "data": run.data.fingerprint if run.data else "fake"}


def open_reporter(run: Run, iteration: int, resuming: bool) -> Reporter:
    described = {"model": run.model, **run.plan.as_dict(),
                 "environment": {**run.environment(), "device": device_name(), "threads": torch.get_num_threads()}}
    log = RunLog(run.output_dir, described, iteration if resuming else None)
    return Reporter(log, Progress(run.last_iteration, run.plan.iterations_per_epoch, iteration))


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def print_evaluation(run: Run, trainer: Trainer) -> None:
    epoch = trainer.iteration // run.plan.iterations_per_epoch
    record = trainer.evaluate(epoch)
    if run.speaks:
        print(f"iteration {trainer.iteration}: top-1 error {record['val_top1_error_pct']:.2f} %, top-5 error "
              f"{record['val_top5_error_pct']:.2f} % on {record['val_images']} images")


def finish(run: Run, trainer: Trainer) -> None:
    """Exports the weights, draws the curves and says where everything is."""
    state = gather_state(trainer.engine)
    if not run.speaks:
        return
    reporter, folder = trainer.reporter, run.output_dir
    checkpoint.export_weights(folder / "weights.pt", state.weights)
    if reporter.log.epochs:
        result = reporter.log.result()
        curves([read_run(folder)], folder / "curves.png")
        reporter.progress.say(f"top-1 error    {result['val_top1_error_pct']:.2f} %, median of the last "
                              f"{min(5, len(reporter.log.epochs))} epochs")
        reporter.progress.say(f"curves         {folder / 'curves.png'}")
    reporter.progress.say(f"log            {reporter.log.path}")
    reporter.progress.say(f"checkpoint     {checkpoint.newest(trainer.folder)}")
    reporter.progress.say(f"weights        {folder / 'weights.pt'} (float32 state_dict)")
