"""Measure how long the device waits for images, and what that costs, if the loader feeds the trainer real JPEGs."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from lbsgd.bench.contestants import fake_images, our_trainer, plan_for, without_end
from lbsgd.bench.figure import Goal, mean_figure, ratio_figure
from lbsgd.bench.parts import NotRun, Say
from lbsgd.bench.sizes import BenchSettings
from lbsgd.config.plan import Plan
from lbsgd.processes.control_groups import usable_cores
from lbsgd.processes.environment import Processes
from lbsgd.train.engine import start_processes
from lbsgd.train.images import cut_of
from lbsgd.train.session import pixel_form
from lbsgd.train.trainer import Trainer

if TYPE_CHECKING:
    from lbsgd.data.beton import BetonFile
    from lbsgd.data.loaders import TrainLoader

WAIT_GOAL = Goal("at most", 2.0)  # % of the time, with 16 cores
WINDOWS = 5
UNTIMED = 6  # updates at the beginning of a window, which use up the batches that are ready
KINDS, CLASSES = (".jpeg", ".jpg"), 10


def data_wait(given: BenchSettings, say: Say) -> None:
    """Feed the trainer's update by the FFCV loader, with one thread per core.

    Report how long it waits, and compare its images per second with those for images already on the device.
    """
    from lbsgd.convert.convert import convert
    from lbsgd.data.folder import open_data
    from lbsgd.data.native.library import library

    if given.jpegs is None:
        raise NotRun("no images: give --jpegs FILE, a tar of JPEGs")
    sizes, cores = given.sizes, usable_cores()
    tree, ffcv = given.folder / "jpegs", given.folder / "ffcv"
    num_different = repeated(given.jpegs, tree, sizes.images_to_feed)
    convert(tree / "source", ffcv, max_side=500, quality=90, num_processes=cores, overwrite=True)
    start_processes()
    say(f"{num_different} JPEGs repeated to {sizes.images_to_feed} and converted")
    plan = plan_for(given, sizes.step_batch)
    trainer = our_trainer(given, plan, sizes.blocks)
    loader = loader_for(open_data(ffcv).train, plan, trainer.engine.device, cores)
    batches, unfed = without_end(loader.epoch), fake_images(plan, trainer.engine.device).epoch(0)
    for source in (batches, unfed):
        window(trainer, source, sizes.warm_up)
    say("the first updates are made")
    waits, speeds, unfed_speeds = [], [], []
    for _ in range(WINDOWS):
        window(trainer, batches, UNTIMED)
        waited, speed = window(trainer, batches, sizes.fed_updates // WINDOWS)
        waits.append(waited)
        speeds.append(speed)
        unfed_speeds.append(window(trainer, unfed, sizes.fed_updates // WINDOWS)[1])
    loader.close()
    decoder = "lbsgd's decoder" if library() else "FFCV's decoder, because lbsgd's is not compiled here"
    beside = f"{median(speeds):.0f} and {median(unfed_speeds):.0f} images/s, {cores} cores, {decoder}"
    say(mean_figure("waiting for data", waits, unit="% of the time", goal=WAIT_GOAL, beside=beside))
    say(ratio_figure("images/s, fed by the loader / from images on the device", speeds, unfed_speeds, beside=beside))


def loader_for(train: BetonFile, plan: Plan, device: Any, threads: int) -> TrainLoader:
    """Return the loader of a run on one process."""
    from lbsgd.data.loaders import TrainLoader  # late: FFCV compiles

    cut, pixels = cut_of(plan, Processes.from_environment()), pixel_form(plan, torch.device(device))
    return TrainLoader(train, cut, threads=threads, pixels=pixels)


def window(trainer: Trainer, batches: Iterator[Any], num_updates: int) -> tuple[float, float]:
    """Make updates. Return the percentage of the time that the device waited for data, and the images/s."""
    trainer.require_numbers()  # waits for the device, so that a window's time is its own
    trainer.clock.start_window()
    for _ in range(num_updates):
        trainer.update(batches)
    trainer.require_numbers()
    took = trainer.clock.window_seconds
    return 100 * trainer.clock.data.of_window / took, num_updates * trainer.plan.global_batch / took


def repeated(tar: Path, tree: Path, num_images: int) -> int:
    """Put the JPEGs of a tar into a tree like ImageNet's, each under several names. Return their number in the tar.

    Raises NotRun if the tar has no JPEGs.
    """
    found: list[Path] = []
    with tarfile.open(tar) as archive:
        for member in archive:
            if member.isfile() and Path(member.name).suffix.lower() in KINDS:
                data = archive.extractfile(member)
                assert data is not None
                place = tree / "different" / f"{len(found)}.JPEG"
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(data.read())
                found.append(place)
    if not found:
        raise NotRun(f"{tar} holds no JPEG")
    for number in range(num_images):
        for split, most in (("train", num_images), ("val", len(found))):
            if number < most:
                link = tree / "source" / split / f"n{number % min(CLASSES, len(found)):08}" / f"{number}.JPEG"
                link.parent.mkdir(parents=True, exist_ok=True)
                link.hardlink_to(found[number % len(found)])
    return len(found)
