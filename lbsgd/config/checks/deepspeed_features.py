"""Rules about DeepSpeed's features for other kinds of training or other loops, and about the keys that they need."""

from __future__ import annotations

from collections.abc import Iterator

from lbsgd.config.checks.deepspeed_beside import offloading
from lbsgd.config.checks.finding import DELETE
from lbsgd.config.checks.rule import Hit, rule
from lbsgd.config.checks.subject import Document
from lbsgd.config.keypath import shown

ZENFLOW, HYBRID = "zero_optimization.zenflow", "hybrid_engine.enabled"
BUILT_FOR_CPU = ("adam", "adamw", "adagrad", "lion", "muon")
NEEDED = {  # the keys without which a feature fails if it is on; the last three features are gone in 0.19
    "data_efficiency.data_sampling.curriculum_learning": ("curriculum_metrics",),
    "data_efficiency.data_sampling.dynamic_batching": ("max_tokens",),
    "data_efficiency.data_routing.random_ltd": ("total_layer_num", "random_ltd_layer_num", "random_ltd_schedule"),
    "elasticity": ("max_train_batch_size", "micro_batch_sizes"),
    "curriculum_learning": ("min_difficulty", "max_difficulty", "schedule_type"),
    "progressive_layer_drop": ("theta", "gamma"),
}


@rule(
    "D91",
    "an engine for another kind of training",
    lbsgd="error",
    why="ZenFlow updates a part of the weights at once and the others later on the CPU, so there is no longer one "
    "update per kn images. The hybrid engine switches between training a language model and generating text with it.",
    fix="delete it",
    example={"hybrid_engine": {"enabled": True}},
)
def other_engine(json: Document) -> Iterator[Hit]:
    if json.get(ZENFLOW) is not None:
        yield Hit(ZENFLOW, "updates a part of the weights later, on the CPU", correction={ZENFLOW: DELETE})
    if json.is_on(HYBRID):
        yield Hit(HYBRID, "is true, and builds an engine for language models", correction={"hybrid_engine": DELETE})


@rule(
    "D92",
    "ZenFlow without offload",
    plain="error",
    why="ZenFlow divides the update between GPU and CPU. Without an offloaded optimizer DeepSpeed refuses it at ZeRO "
    "stages 1 and 2, and at the others the weights do not move.",
    fix='give "offload_optimizer": {"device": "cpu"}, or delete it',
    example={"zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000, "zenflow": {}}},
)
def zenflow_alone(json: Document) -> Iterator[Hit]:
    alone = not offloading(json, "offload_optimizer")
    if isinstance(json.get(ZENFLOW), dict) and alone and json.since("0.17"):
        yield Hit(ZENFLOW, "is there without an offloaded optimizer")


@rule(
    "D99",
    "an offload to NVMe without its path",
    plain="error",
    why="DeepSpeed writes what it offloads to NVMe into the folder nvme_path, and ZeRO stage 3 fails without it.",
    fix='give a folder, such as "/local_nvme"',
    example={
        "train_batch_size": 256,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.001}},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "reduce_bucket_size": 1000,
            "offload_param": {"device": "nvme"},
        },
    },
)
def pathless_offload(json: Document) -> Iterator[Hit]:
    for name in ("offload_param", "offload_optimizer") if json.stage == 3 else ():
        block = json.block(f"zero_optimization.{name}")
        if block.get("device") == "nvme" and block.get("nvme_path") is None:
            yield Hit(f"zero_optimization.{name}.nvme_path", "is missing, and the device is nvme")


@rule(
    "D66",
    "an offloaded optimizer without ZeRO",
    plain="warning",
    why="DeepSpeed builds its own Adam, Adagrad, Lion and Muon for the CPU if offload_optimizer is given, but at "
    "stage 0 it leaves the weights on the GPU, so the first update fails there.",
    fix="delete it, or use ZeRO stage 1, 2 or 3",
    example={
        "optimizer": {"type": "AdamW", "params": {"lr": 0.001}},
        "zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}},
    },
)
def offload_without_zero(json: Document) -> Iterator[Hit]:
    if json.stage == 0 and json.has_own_optimizer(BUILT_FOR_CPU):
        for key in offloading(json, "offload_optimizer"):
            yield Hit(f"zero_optimization.{key}", "moves the update to the CPU, and at stage 0 the weights stay")


@rule(
    "D93",
    "a feature without what it needs",
    lbsgd="error",
    plain="error",
    why="DeepSpeed asks for the metrics of a curriculum, the tokens of a dynamic batch and the layers of random token "
    "dropping wherever enabled is true, even where data_efficiency around it is off. Before 0.19 it asks the same of "
    "elasticity, of the older curriculum_learning and of progressive_layer_drop.",
    fix="give it, or set enabled to false",
    example={"data_efficiency": {"data_sampling": {"dynamic_batching": {"enabled": True}}}},
)
def needy_feature(json: Document) -> Iterator[Hit]:
    for name, needed in NEEDED.items():
        block = json.block(name) if name not in json.accepted.removed else {}
        missing = [key for key in needed if key not in block]
        if block.get("enabled") and block["enabled"] != "auto" and missing:
            yield Hit(f"{name}.{missing[0]}", f"is missing, and enabled is {shown(block['enabled'])}")


@rule(
    "D96",
    "accumulation by the program that DeepSpeed refuses",
    plain="error",
    why="Without managed_gradient_accumulation the program says when weights move. DeepSpeed refuses that beside "
    "overlap_comm at stages 0 and 1, and beside DeepCompile.",
    fix="delete it",
    example={"managed_gradient_accumulation": False, "zero_optimization": {"stage": 0, "overlap_comm": True}},
)
def own_accumulation_that_is_refused(json: Document) -> Iterator[Hit]:
    key = "managed_gradient_accumulation"
    beside = {
        f"beside overlap_comm at ZeRO stage {json.stage}": json.stage in (0, 1)
        and json.is_on("zero_optimization.overlap_comm"),
        "beside DeepCompile": json.is_on("compile.deepcompile"),
    }
    where = [words for words, stands in beside.items() if stands]
    if not json.get(key, True) and where and json.since("0.19"):
        yield Hit(key, f"is {shown(json.get(key))} {where[0]}")
