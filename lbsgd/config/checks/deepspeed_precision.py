"""Rules about half precision that does not train, is ambiguous, or rounds values that must not be rounded."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from lbsgd.config.accepted.values import as_bool, as_number, converts
from lbsgd.config.checks.deepspeed_batch import NAMES_OF_TYPES
from lbsgd.config.checks.deepspeed_fp16 import is_unscaled
from lbsgd.config.checks.finding import DELETE
from lbsgd.config.checks.rule import Hit, rule
from lbsgd.config.checks.subject import Document
from lbsgd.config.keypath import shown

BLOCKS = ("torch_autocast", "fp16", "bf16")
AUTOCAST_KEYS = frozenset("enabled dtype lower_precision_safe_modules".split())
FLOAT16 = NAMES_OF_TYPES["fp16"]
BFLOAT16 = ("bfloat16", "torch.bfloat16")


@rule(
    "D28",
    "an unknown key in torch_autocast",
    lbsgd="error",
    plain="warning",
    why="DeepSpeed looks up single keys of this block and ignores the others, so a misspelt key leaves the run in "
    "float32 or in the default type.",
    fix=f"known are {', '.join(sorted(AUTOCAST_KEYS))}",
    example={"torch_autocast": {"enable": True}},
)
def unknown_autocast_key(json: Document) -> Iterator[Hit]:
    if unknown := sorted(set(json.block("torch_autocast")) - AUTOCAST_KEYS):
        yield Hit("torch_autocast", f"has unknown {', '.join(map(shown, unknown))}, which DeepSpeed ignores in silence")


@rule(
    "D98",
    "a precision that is not switched on",
    lbsgd="error",
    plain="warning",
    why="A block fp16, bf16 or torch_autocast does nothing without its enabled, and DeepSpeed trains in float32. The "
    "keys in it say that something else is meant.",
    fix='add "enabled": true, or delete the block',
    example={"fp16": {"enabled": None, "auto_cast": None}, "zero_optimization": {"stage": 0}},
)
def precision_left_off(json: Document) -> Iterator[Hit]:
    if any(json.enabled(block) for block in BLOCKS) or json.get("amp.enabled"):
        return
    for block in (*BLOCKS, "bfloat16"):
        if json.block(block) and "enabled" not in json.block(block):
            yield Hit(block, "has no enabled, so it is off and DeepSpeed trains in float32")


@rule(
    "D12",
    "fp16 that does not cast the images",
    lbsgd="warning",
    why="The weights are float16, and without auto_cast DeepSpeed passes the images on as they are: float32 "
    "images meet float16 weights, and the first convolution fails. It casts what the network is given by position, "
    "and nothing by keyword.",
    fix="set it to true",
    example={"fp16": {"auto_cast": False}},
)
def images_not_cast(json: Document) -> Iterator[Hit]:
    cast = json.get("fp16.auto_cast", False)
    if json.enabled("fp16") and converts("bool", cast) and not as_bool(cast):  # D70 judges other values
        said = f"is {shown(cast)}, so plain DeepSpeed feeds float32 images to half weights"
        yield Hit("fp16.auto_cast", said, correction={"fp16.auto_cast": True})


@rule(
    "D57",
    "torch's batch norm with half-precision weights",
    plain="note",
    why="fp16 and bf16 convert every weight, those of batch norm too. DeepSpeed 0.19 leaves the running statistics in "
    "float32, and torch's BatchNorm then raises a RuntimeError on a CPU and on contiguous GPU tensors. It works where "
    "the statistics are rounded as well, as by earlier versions and by data_types.buffer_dtype.",
    fix="lbsgd.convert_batch_norm, or torch_autocast",
    example={
        "train_batch_size": 256,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "bf16": {"enabled": True},
    },
)
def half_batch_norm(json: Document) -> Iterator[Hit]:
    if json.weights != "fp32" and json.is_sgd and json.since("0.19") and not rounds_statistics(json):
        said = "makes weights half precision, and torch's BatchNorm then fails on a CPU and on contiguous GPU tensors"
        yield Hit(json.weights, said)


def rounds_statistics(json: Document) -> bool:
    """Whether all of batch norm's buffers get the type of its weights."""
    kept = json.get("data_types.keep_in_fp32_modules")
    return json.get("data_types.buffer_dtype") in NAMES_OF_TYPES[json.weights] and kept in (None, "auto", [])


@rule(
    "D94",
    "images cast to float16 for weights that are not",
    lbsgd="error",
    plain="error",
    why="DeepSpeed casts images if fp16.auto_cast is true, even if fp16 is off. The float16 images then meet weights "
    "of another type in the first layer, which only torch_autocast accepts, with rounded images. It casts what the "
    "network is given by position, and nothing by keyword, as Hugging Face's Trainer gives it. Version 0.16 looks at "
    "enabled first.",
    fix="delete it, or switch fp16 on",
    example={"fp16": {"enabled": False}, "zero_optimization": {"stage": 0}},
)
def images_cast_alone(json: Document) -> Iterator[Hit]:
    switch = json.get("fp16.enabled", False)
    unclear = switch == "auto" or (not json.plain and type(switch) is not bool)  # D27 judges it
    fits = unclear or json.enabled("fp16") or (json.plain and json.enabled("torch_autocast"))
    if json.is_on("fp16.auto_cast") and not fits and json.since("0.17"):
        yield Hit(
            "fp16.auto_cast",
            "is true without fp16, so images given by position meet weights of another type in float16",
        )


@rule(
    "D13",
    "weights in bfloat16",
    lbsgd="error",
    why="DeepSpeed's bf16 block rounds the weights themselves to 8 bits and does not cast the images. Autocast "
    "keeps weights and momentum in float32 and computes in bfloat16.",
    fix='use {"torch_autocast": {"enabled": true, "dtype": "bfloat16"}}',
    example={"bf16": {"enabled": True}, "fp16": None},
)
def bfloat16_weights(json: Document) -> Iterator[Hit]:
    said = "keeps the weights themselves in bfloat16 and does not cast the images"
    for block in ("bf16", "bfloat16"):  # the second is DeepSpeed's old name
        if json.enabled(block):
            yield Hit(block, said, correction=as_autocast(json, block))


def as_autocast(json: Document, block: str) -> dict[str, Any] | None:
    """Return the correction to autocast; None if another precision is also on, or autocast has another type."""
    dtype = json.get("torch_autocast.dtype", "bfloat16")
    if json.enabled("fp16") or json.enabled("torch_autocast") or dtype not in BFLOAT16:
        return None
    return {"torch_autocast.enabled": True, "torch_autocast.dtype": dtype, block: DELETE}


@rule(
    "D14",
    "autocast to float16",
    lbsgd="error",
    plain="error",
    why="float16 needs a loss scale. The one that DeepSpeed 0.19.8 uses for autocast never falls under ZeRO and "
    "is saved in no checkpoint, so one overflow may stop the training for good.",
    fix="use bfloat16, or the fp16 block with ZeRO stage 1",
    example={"torch_autocast": {"enabled": True, "dtype": "float16"}, "fp16": None},
)
def float16_autocast(json: Document) -> Iterator[Hit]:
    dtype = str(json.get("torch_autocast.dtype", "bfloat16"))
    wrong = (dtype in FLOAT16 and json.stage and json.refused("D14")) if json.plain else dtype not in BFLOAT16
    if json.enabled("torch_autocast") and wrong:
        said = f"is {dtype}, whose loss scale DeepSpeed 0.19.8 neither saves nor lowers under ZeRO"
        yield Hit("torch_autocast.dtype", said)


@rule(
    "D15",
    "two precisions at once",
    lbsgd="error",
    plain="error",
    why="fp16, bf16 and torch_autocast exclude each other. DeepSpeed refuses some pairs, and for the others it is "
    "not defined which one wins.",
    fix="choose one",
    example={"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
)
def two_precisions(json: Document) -> Iterator[Hit]:
    on = [block for block in BLOCKS if json.enabled(block)]
    refused = any(json.refused(f"D15 {one} {other}") for one, other in itertools.combinations(on, 2))
    if len(on) > 1 and refused:
        yield Hit(on[0], f"is enabled together with {' and '.join(on[1:])}")


@rule(
    "D16",
    "buffers rounded to half precision",
    lbsgd="error",
    why="The running mean and variance of batch norm are buffers. They move by a tenth of a small difference in "
    "each iteration, which half precision rounds away.",
    fix="delete it",
    example={"data_types": {"buffer_dtype": "fp16"}},
)
def rounded_buffers(json: Document) -> Iterator[Hit]:
    if json.get("data_types.buffer_dtype") is not None:
        said = "would round batch norm's running statistics"
        yield Hit("data_types.buffer_dtype", said, correction={"data_types.buffer_dtype": DELETE})


@rule(
    "D42",
    "skipped updates that nobody sees",
    plain="note",
    why="fp16 skips every update whose gradients overflow. Since 0.17 DeepSpeed logs that below the level that it "
    "prints, as the lines that steps_per_print asks for. Version 0.19 warns of each where the loss scale is "
    "static and ZeRO is on.",
    fix="read engine.skipped_steps in your program",
    example={
        "fp16": {"enabled": True},
        "zero_optimization": {"stage": 1, "overlap_comm": True, "reduce_bucket_size": 1000},
    },
)
def unseen_overflow(json: Document) -> Iterator[Hit]:
    warns = json.since("0.19") and json.stage != 0 and as_number(json.get("fp16.loss_scale", 0)) != 0
    if json.enabled("fp16") and json.since("0.17") and not warns and not is_unscaled(json):  # D11 and D73 say more
        said = f"is on, and DeepSpeed {json.accepted.version} prints nothing of an update that it skips for overflow"
        yield Hit("fp16", said)
