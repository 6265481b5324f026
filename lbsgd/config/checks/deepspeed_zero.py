"""Rules about ZeRO: its stages, its buckets, and its offloading to the CPU (Sec. 4)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lbsgd.config.accepted.values import as_whole_number
from lbsgd.config.checks.deepspeed_batch import FACTOR, is_divisor
from lbsgd.config.checks.deepspeed_beside import OLD_NAMES, copies_weights_itself, offloading, reads_factor
from lbsgd.config.checks.deepspeed_values import numbers_meant
from lbsgd.config.checks.finding import DELETE
from lbsgd.config.checks.rule import Hit, rule
from lbsgd.config.checks.subject import Document
from lbsgd.config.keypath import BATCH, BUCKET, DEFAULT_BUCKET, MICRO, PASSES, is_count, is_number, shown

ZERO = "zero_optimization"
STAGE, GATHERED = f"{ZERO}.stage", f"{ZERO}.allgather_bucket_size"
OF_STAGE_3 = ("sub_group_size", "zero_hpz_partition_size")
RESNET50_BUCKET = 6_000_000  # a fourth of ResNet-50's 25.6 million parameters
LARGEST_BUCKET = 25_000_000


@rule(
    "D17",
    "a ZeRO stage that cannot be used",
    lbsgd="error",
    plain="error",
    why="DeepSpeed knows the stages 0 to 3. Stage 3 divides the weights themselves among GPUs; lbsgd does not support "
    "it, because a whole ResNet fits on every GPU.",
    fix="use 0, 1 or 2: ResNets fit on every GPU whole",
    example={"zero_optimization": {"stage": 3}},
)
def unusable_stage(json: Document) -> Iterator[Hit]:
    given = json.get(STAGE, 0)
    if json.plain and json.stage is None and given != "auto":
        yield Hit(STAGE, f"is {shown(given)}", "use 0, 1, 2 or 3")
    elif not json.plain and json.stage not in (0, 1, 2):
        yield Hit(STAGE, f"is {shown(given)}")


@rule(
    "D50",
    "keys without effect at this ZeRO stage",
    plain="note",
    why="The keys stage3_*, zero_quantized_*, offload_param (formerly cpu_offload_param), sub_group_size and "
    "zero_hpz_partition_size act at stage 3. At any other stage DeepSpeed ignores them, though it may log "
    '"Using quantized gradients".',
    fix="delete it, or use stage 3",
    example={
        "zero_optimization": {
            "stage": 1,
            "overlap_comm": True,
            "reduce_bucket_size": 1000,
            "stage3_max_live_parameters": 1000,
        }
    },
)
def idle_keys(json: Document) -> Iterator[Hit]:
    alone = ("offload_param", OLD_NAMES["offload_param"], *OF_STAGE_3)
    idle = sorted(key for key in json.block(ZERO) if key.startswith(("stage3_", "zero_quantized_")) or key in alone)
    if idle and json.stage in (0, 1, 2):
        others = f", nor have {len(idle) - 1} more keys" if len(idle) > 1 else ""
        yield Hit(f"{ZERO}.{idle[0]}", f"has no effect at stage {json.stage}{others}")


@rule(
    "D19",
    "SGD's state moved to the CPU",
    lbsgd="error",
    plain="warning",
    why="Offload, once called cpu_offload and cpu_offload_param, runs DeepSpeed's Adam on the CPU. SGD has one number "
    "per weight to move, 100 MB for ResNet-50, and every iteration would wait for the CPU.",
    fix="delete it",
    example={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
)
def offloaded_sgd(json: Document) -> Iterator[Hit]:
    for name in OLD_NAMES if json.is_sgd else ():
        if json.plain and name == "offload_param":  # it moves the weights, at stage 3
            continue
        for key in offloading(json, name):
            said = "is made for Adam on the CPU; SGD's one state is small"
            yield Hit(f"{ZERO}.{key}", said, correction={f"{ZERO}.{key}": DELETE})


@rule(
    "D51",
    "a bucket size that is not a number",
    lbsgd="error",
    why="The size of a bucket decides how many gradients DeepSpeed reduces at a time, and `lbsgd plan` counts with it.",
    fix="give it as a number of elements",
    example={"zero_optimization": {"reduce_bucket_size": "large"}},
)
def bucket_size(json: Document) -> Iterator[Hit]:
    bucket = json.get(BUCKET, DEFAULT_BUCKET)
    if not is_number(bucket) or bucket < 1:
        yield Hit(BUCKET, f"is {shown(bucket)}", correction=bucket_meant(bucket))


def bucket_meant(bucket: Any) -> dict[str, Any] | None:
    """Return the correction of a text to its whole number, or of a word to ResNet-50's size; None for other numbers."""
    numbers = list(numbers_meant(bucket))
    if numbers or is_number(bucket):
        whole = [int(number) for number in numbers if number >= 1 and number == int(number)]
        return {BUCKET: whole[0]} if whole else None
    return {BUCKET: RESNET50_BUCKET}


@rule(
    "D95",
    "an allgather bucket of an odd number of elements",
    lbsgd="error",
    plain="error",
    why="ZeRO stages 1 and 2 gather weights from addresses that are multiples of 4 bytes, two float16 numbers. An "
    "assertion fails at the start where allgather_bucket_size is odd.",
    fix="give an even number",
    example={"zero_optimization": {"allgather_bucket_size": 30_000_001}},
)
def odd_bucket(json: Document) -> Iterator[Hit]:
    size = as_whole_number(json.get(GATHERED, 0))
    if size is not None and size > 0 and size % 2 and json.stage in (1, 2) and not copies_weights_itself(json):
        yield Hit(GATHERED, f"is {size} at ZeRO stage {json.stage}, which is odd")


@rule(
    "D20",
    "a bucket larger than the network",
    lbsgd="warning",
    plain="note",
    why="Gradients are reduced bucket by bucket while back-propagation still computes others (Sec. 4). A bucket "
    "of 25 million elements holds nearly all of ResNet-50, so nothing is reduced before back-propagation "
    "ends. DeepSpeed's default is 500 million.",
    fix="use a fourth of the network's parameters or less (6000000 for ResNet-50)",
    example={"zero_optimization": {"reduce_bucket_size": 500_000_000}},
)
def large_bucket(json: Document) -> Iterator[Hit]:
    bucket = json.get(BUCKET, DEFAULT_BUCKET)
    if json.stage in (1, 2) and is_number(bucket) and bucket > LARGEST_BUCKET:
        said = (
            f"is {bucket:g} elements, all gradients of a smaller network (ResNet-50 has 25.6 million), so none is "
            "reduced during back-propagation (Sec. 4)"
        )
        yield Hit(BUCKET, said, correction={BUCKET: RESNET50_BUCKET} if json.get(BUCKET) is None else None)


@rule(
    "D41",
    "gradients that are not reduced during back-propagation",
    lbsgd="note",
    plain="note",
    why="With overlap_comm DeepSpeed reduces a full bucket while the GPU computes the gradients of earlier "
    "layers; this is how the paper hides most of its communication (Sec. 4).",
    fix="set it to true, with a small reduce_bucket_size",
    example={"zero_optimization": {"overlap_comm": False}},
)
def no_overlap(json: Document) -> Iterator[Hit]:
    key = "zero_optimization.overlap_comm"
    if json.stage in (1, 2) and not json.is_on(key):
        said = (
            "gradients are reduced after back-propagation"
            if json.stage == 1
            else "back-propagation waits for each bucket"
        )
        yield Hit(key, f"is not true, so {said} (Sec. 4)")


@rule(
    "D37",
    "a checkpoint that expects Adam's state",
    lbsgd="error",
    plain="warning",
    why="Elastic and universal checkpoints look for Adam's two moments. With SGD the checkpoint is written and "
    "fails only when it is loaded, after the time to repeat the run is lost.",
    fix="delete it",
    example={"zero_optimization": {"elastic_checkpoint": True}},
)
def checkpoint_of_adam(json: Document) -> Iterator[Hit]:
    for key in ("zero_optimization.elastic_checkpoint", "checkpoint.load_universal"):
        if json.is_sgd and json.is_on(key):
            said = "expects Adam's state: with SGD it fails when a checkpoint is loaded"
            yield Hit(key, said, correction=json.beside_intent({key: DELETE}))


@rule(
    "D59",
    "gradients divided twice",
    plain="warning",
    why="At ZeRO stage 3 without reduce_scatter DeepSpeed divides gradients by gradient_predivide_factor and by the "
    "number of processes, and then multiplies them by the factor, unless the two are the same number. Then the "
    "gradients are too small by this factor.",
    fix="delete it",
    example={
        "gradient_predivide_factor": 8,
        "zero_optimization": {"stage": 3, "reduce_scatter": False, "overlap_comm": True},
    },
)
def divided_twice(json: Document) -> Iterator[Hit]:
    factor, processes = json.get(FACTOR, 1), processes_of(json)
    scatters = json.is_on(f"{ZERO}.reduce_scatter", True)
    if json.stage == 3 and not scatters and reads_factor(json) and is_divisor(factor) and factor > 1:
        if processes in (None, factor):
            yield Hit(FACTOR, f"is {factor:g}, and on {factor:g} processes ZeRO-3 divides gradients by it twice")


def processes_of(json: Document) -> int | None:
    """Return the number of processes that follows from three batch sizes; None if one of them is missing."""
    kn, micro, passes = (json.get(key) for key in (BATCH, MICRO, PASSES))
    return kn // (micro * passes) if is_count(kn) and is_count(micro) and is_count(passes) else None
