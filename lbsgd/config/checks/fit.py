"""Rules about a run's fit to its processes and its data: kn = k·n = world_size · micro_batch · passes."""

from __future__ import annotations

from collections.abc import Iterator

from lbsgd.config.checks import fit_schedule
from lbsgd.config.checks.deepspeed_batch import is_divisor
from lbsgd.config.checks.finding import DELETE
from lbsgd.config.checks.rule import Hit, rule
from lbsgd.config.checks.subject import Planned
from lbsgd.config.derive import divisors
from lbsgd.config.keypath import BATCH, MICRO, PASSES, shown
from lbsgd.units import counted


@rule(
    "R02",
    "a global batch that is not a multiple of n",
    lbsgd="error",
    why="Each of the paper's k workers normalises n = 32 images, so kn must be a multiple of n (Sec. 2.3).",
    fix="use a multiple of n",
    example={"train_batch_size": 8184},
)
def whole_workers(planned: Planned) -> Iterator[Hit]:
    kn, n = planned.global_batch, planned.per_worker_batch
    if not planned.has_whole_workers:
        fitting = " or ".join(str(k * n) for k in (kn // n, kn // n + 1) if k)
        fix = f"k = kn/n workers must be whole: use {fitting}"
        yield Hit(BATCH, f"is {kn}, no multiple of n = {n}", fix)


@rule(
    "F01",
    "workers that cannot be divided among the processes",
    lbsgd="error",
    why="Every process takes the same number of the k workers, so the number of processes must divide k.",
    fix="use a number of processes that divides k",
    example={"train_batch_size": 8192},
    processes=3,
)
def dividable_workers(planned: Planned) -> Iterator[Hit]:
    kn, n, world_size = planned.global_batch, planned.per_worker_batch, planned.world_size
    k = kn // n
    if planned.has_whole_workers and k % world_size:
        said = f"is {kn}, whose k = {k} workers of n = {n} cannot be divided among {world_size} processes"
        yield Hit(BATCH, said, f"numbers of processes that fit: {on_one_line(divisors(k))}")


@rule(
    "F02",
    "a micro batch that does not fit",
    lbsgd="error",
    why="One pass takes whole workers, because batch norm sees a worker's n images together, and a process takes "
    "its share of kn in whole passes.",
    fix="use a multiple of n that divides the images of a process",
    example={"train_micro_batch_size_per_gpu": 48},
)
def micro_batch(planned: Planned) -> Iterator[Hit]:
    kn, n, micro, world_size = planned.global_batch, planned.per_worker_batch, planned.micro_batch, planned.world_size
    share = kn // world_size
    if kn % (n * world_size) == 0 and (micro % n or share % micro):
        whose = f"each of {world_size} processes" if world_size > 1 else "one process"
        said = f"is {micro}, no multiple of n = {n} that divides the {share} images of {whose}"
        fitting = [n * d for d in divisors(share // n)]
        yield Hit(MICRO, said, f"micro batches that fit: {on_one_line(fitting)}")


@rule(
    "F03",
    "a global batch larger than the data",
    lbsgd="error",
    why="An epoch is ⌊N/kn⌋ iterations. With more images in a batch than in the data it has none.",
    fix="use a smaller train_batch_size (--global_batch) or more data",
    example={"lbsgd": {"num_images": 8000}, "scheduler": {"params": {"warmup_num_steps": 1}}},
)
def an_iteration(planned: Planned) -> Iterator[Hit]:
    kn, num_images = planned.global_batch, planned.recipe.num_images
    if num_images < kn:
        said = f"is {kn}, more than the {num_images} images of the training data"
        yield Hit(BATCH, said)


@rule(
    "F04",
    "statistics of more images than there are",
    lbsgd="error",
    why="With statistics recomputed, so many training images pass through the network before an evaluation (Sec. 5.2).",
    fix="use fewer",
    example={"lbsgd": {"batch_norm": {"statistics": "recomputed", "statistics_images": 3_200_000}}},
)
def statistics_images(planned: Planned) -> Iterator[Hit]:
    wanted, num_images = planned.recipe.batch_norm.statistics_images, planned.recipe.num_images
    if wanted and wanted > num_images:
        said = f"is {wanted}, more than the {num_images} images of the training data"
        yield Hit("lbsgd.batch_norm.statistics_images", said)


@rule(
    "F05",
    "a number of passes that does not fit",
    lbsgd="error",
    why="The number of passes follows from the batches and the number of processes, which a JSON does not know. "
    "Where it is written it must agree.",
    fix="delete it: it follows",
    example={"gradient_accumulation_steps": 2},
    processes=8,
)
def passes(planned: Planned) -> Iterator[Hit]:
    written, kn, micro, world_size = planned.get(PASSES), planned.global_batch, planned.micro_batch, planned.world_size
    following = kn / (world_size * micro)
    if written is not None and written != following:
        on = f"{counted(world_size, 'process')} x {micro}"
        said = f"is {shown(written)}, but {kn} images on {on} are {following:g} passes"
        yield Hit(PASSES, said, correction={PASSES: DELETE})


@rule(
    "F07",
    "a number of passes that fits no number of processes",
    lbsgd="error",
    why="The global batch is micro batch x passes x processes. Where the first is no multiple of the other two, every "
    "run refuses the file.",
    fix="delete it: it follows",
    example={"gradient_accumulation_steps": 7},
)
def impossible_passes(planned: Planned) -> Iterator[Hit]:
    written, kn, micro = planned.get(PASSES), planned.global_batch, planned.micro_batch
    if written is None or kn % micro:
        return
    if not is_divisor(written) or kn % (micro * written):
        said = f"is {shown(written)}, and {kn} images are {kn // micro} passes of {micro} on all processes together"
        yield Hit(PASSES, said, correction={PASSES: DELETE})


@rule(
    "F09",
    "gradient noise of an update that is one chunk",
    lbsgd="error",
    why="The noise is the difference between the gradients of an update's chunks, one per process and pass. An update "
    "whose images all go through one pass of one process has a single chunk.",
    fix="use a smaller micro batch or a larger global batch, or delete lbsgd.diagnostics.gradient_noise",
    example={
        "train_batch_size": 256,
        "train_micro_batch_size_per_gpu": 256,
        "optimizer": {"params": {"lr": 0.1}},
        "scheduler": {"params": {"warmup_max_lr": 0.1, "warmup_num_steps": 1}},
        "fp16": None,
        "zero_optimization": {"stage": 0},
        "lbsgd": {"warmup": {"kind": "none", "epochs": 0}, "diagnostics": {"gradient_noise": 100}},
    },
)
def noise_of_one_chunk(planned: Planned) -> Iterator[Hit]:
    every, kn, n = planned.recipe.diagnostics.gradient_noise, planned.global_batch, planned.per_worker_batch
    if every is not None and planned.micro_batch == kn:
        fitting = [n * d for d in divisors(kn // n)][:-1]
        more = f"micro batches that make several: {on_one_line(fitting)}"
        fix = more if fitting else "use a larger train_batch_size, or delete lbsgd.diagnostics.gradient_noise"
        yield Hit("lbsgd.diagnostics.gradient_noise", f"is {every}, but {kn} images in one pass are one chunk", fix)


def on_one_line(numbers: list[int]) -> str:
    """Format a list of numbers; of more than 12, the first 11 and the last."""
    return ", ".join(map(str, numbers if len(numbers) <= 12 else [*numbers[:11], f"... {numbers[-1]}"]))


RULES = (
    whole_workers,
    dividable_workers,
    micro_batch,
    statistics_images,
    an_iteration,
    *fit_schedule.RULES,
    noise_of_one_chunk,
)
PASSES_RULES = (passes,)  # apart, because the JSON's number is void if flags divide kn otherwise
FILE_RULES = (impossible_passes,)  # for a file alone, if the number of processes is unknown
