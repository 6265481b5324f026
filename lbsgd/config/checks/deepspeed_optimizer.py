"""Rules about the optimizer block: which optimizer it names, with which arguments, and whether DeepSpeed uses it."""

from __future__ import annotations

from collections.abc import Iterator

from lbsgd.config.checks.deepspeed_keys import in_another_case, similar
from lbsgd.config.checks.finding import DELETE
from lbsgd.config.checks.rule import Hit, rule
from lbsgd.config.checks.subject import Document
from lbsgd.config.keypath import shown, stated

TYPE, PARAMS = "optimizer.type", "optimizer.params"
SGD_PARAMS = frozenset("lr momentum nesterov weight_decay foreach fused".split())
REMOVED_OPTIMIZERS = frozenset("onebitadam zerooneadam onebitlamb".split())  # since 0.19


def own_class(json: Document, name: str) -> str | None:
    """Return the type that a name of a DeepSpeed class means, such as Adam for FusedAdam and DeepSpeedCPUAdam."""
    stem = name.removeprefix("deepspeed").removeprefix("cpu").removeprefix("fused")
    return stem.capitalize() if stem in json.accepted.optimizers else None


@rule(
    "D06",
    "an optimizer that DeepSpeed does not know",
    lbsgd="error",
    plain="error",
    why='DeepSpeed takes its own optimizers in any case and those of torch.optim letter for letter: "sgd" is '
    "refused. The 1-bit optimizers were removed.",
    fix="name one that DeepSpeed knows",
    example={"optimizer": {"type": "sgd"}},
)
def unknown_optimizer(json: Document) -> Iterator[Hit]:
    kind, name = json.get(TYPE), json.optimizer
    if json.optimizer_entry or not json.names_optimizer:
        return
    torch_names = frozenset(json.accepted.torch_optimizers)
    if name in REMOVED_OPTIMIZERS:
        successor = "SGD" if not json.plain else "Lamb" if "lamb" in name else "Adam"
        said = f"is {kind}, which was removed from DeepSpeed"
        yield Hit(TYPE, said, f"use {successor}, and delete the parameters that only {kind} knew")
        return
    right = in_another_case(kind, torch_names)
    said = f"is {shown(kind)}, which DeepSpeed refuses: it wants a class of torch.optim, letter for letter"
    near = right or own_class(json, name) or similar(str(kind), torch_names)
    yield Hit(TYPE, said, f'use "{near}"' if near else None, {TYPE: right} if right else None)


@rule(
    "D56",
    "an optimizer that is not SGD",
    lbsgd="error",
    why="An lbsgd block describes the paper's recipe, which is SGD with momentum. Its learning rates, warmup and "
    "momentum correction are for SGD alone.",
    fix='use "SGD", or delete the lbsgd block',
    example={"optimizer": {"type": "Adam"}},
)
def other_optimizer(json: Document) -> Iterator[Hit]:
    kind = json.get(TYPE)
    if kind != "SGD" and (json.optimizer_entry or not json.names_optimizer):
        yield Hit(TYPE, f'{stated(kind)}, and the paper\'s recipe is "SGD"')


@rule(
    "D07",
    "a parameter that SGD does not have",
    lbsgd="error",
    why="torch.optim.SGD raises a TypeError for an unknown parameter. Dampening and maximize, which it knows, are "
    "no part of the paper's update.",
    fix=f"known are {', '.join(sorted(SGD_PARAMS))}",
    example={"optimizer": {"params": {"dampening": 0.1}}},
)
def unknown_sgd_parameter(json: Document) -> Iterator[Hit]:
    params = json.get(PARAMS, {})
    if not isinstance(params, dict):
        yield Hit(PARAMS, f"is {shown(params)}, and no block of keys", "give it as a block of keys: {...}")
    elif unknown := sorted(set(params) - SGD_PARAMS):
        yield Hit(PARAMS, f"has {', '.join(map(shown, unknown))}, which the paper's SGD does not take")


@rule(
    "D69",
    "an optimizer that climbs",
    plain="warning",
    why="Optimizers of torch.optim with maximize add the gradient instead of subtracting it, so the loss grows. "
    "DeepSpeed passes the key on without a word.",
    fix="delete it, unless your program negates its loss",
    example={"optimizer": {"type": "SGD", "params": {"lr": 0.1, "maximize": True}}},
)
def climbing_optimizer(json: Document) -> Iterator[Hit]:
    entry = json.optimizer_entry
    if entry and "maximize" in entry.get("params", {}) and json.block(PARAMS).get("maximize") is True:
        yield Hit(f"{PARAMS}.maximize", "is on, and every update then makes the loss larger")


@rule(
    "D25",
    "Nesterov without momentum",
    lbsgd="error",
    plain="error",
    why="Nesterov's step looks ahead along the momentum. Without momentum torch.optim.SGD refuses it.",
    fix="give a momentum above 0 (the paper's is 0.9), or set nesterov to false",
    example={"optimizer": {"params": {"momentum": 0}}},
)
def nesterov_without_momentum(json: Document) -> Iterator[Hit]:
    params = json.block(PARAMS)
    momentum = params.get("momentum", 0 if json.plain else None)  # R05 asks for one if there is an lbsgd block
    refused = momentum == 0 or (json.plain and params.get("dampening", 0))
    if json.get(TYPE) == "SGD" and params.get("nesterov") and refused:
        yield Hit(f"{PARAMS}.nesterov", "is true with momentum 0 or with dampening")


@rule(
    "D08",
    "gradients that are clipped",
    lbsgd="error",
    plain="warning",
    why="DeepSpeed 0.19 clips the norm of the gradients at 1.0 where the JSON says nothing; earlier versions did "
    "not. The paper does not clip.",
    fix="write 0.0 for no clipping, as in the paper, or in plain DeepSpeed the norm you mean",
    example={"gradient_clipping": None},
)
def clipped_gradients(json: Document) -> Iterator[Hit]:
    clipping, correction = json.get("gradient_clipping"), {"gradient_clipping": 0.0}
    if json.plain and not json.accepted.default_clipping:
        return
    if "gradient_clipping" not in json.config and "max_grad_norm" not in json.block(PARAMS):
        said = "is not set, and DeepSpeed 0.19 then clips the gradients' norm at 1.0"
        yield Hit("gradient_clipping", said, correction=correction if json.is_sgd or not json.plain else None)
    elif clipping != 0 and not json.plain:
        yield Hit("gradient_clipping", f"is {shown(clipping)}", "the paper does not clip: set it to 0.0", correction)


@rule(
    "D30",
    "a block without a type",
    plain="warning",
    why="DeepSpeed builds an optimizer or a scheduler only from a block that names its type. Without one the "
    "block's numbers have no effect.",
    fix="give its type, or delete it where your program passes the object itself",
    example={"optimizer": {"params": {"lr": 0.1}}},
)
def block_without_type(json: Document) -> Iterator[Hit]:
    for block in ("optimizer", "scheduler"):
        if isinstance(json.get(block), dict) and json.get(f"{block}.type") is None:
            yield Hit(block, f"is a dead block: without a type DeepSpeed builds no {block} from it")


@rule(
    "D55",
    "an optimizer block that a program may override",
    plain="note",
    why="deepspeed.initialize(optimizer=...) wins over the JSON without a word, and the numbers in this block "
    "then have no effect.",
    fix="keep the two the same, or delete it",
    example={"optimizer": {"type": "AdamW", "params": {"lr": 0.001}}},
)
def overridden_block(json: Document) -> Iterator[Hit]:
    if json.names_optimizer:
        yield Hit("optimizer", "is a dead block where your program passes an optimizer to deepspeed.initialize")


@rule(
    "D33",
    "max_grad_norm inside the optimizer",
    plain="error",
    why="DeepSpeed clips by itself, by gradient_clipping, and refuses max_grad_norm among the optimizer's parameters.",
    fix="use gradient_clipping",
    example={"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1.0}}},
)
def misplaced_clipping(json: Document) -> Iterator[Hit]:
    key = f"{PARAMS}.max_grad_norm"
    if "max_grad_norm" in json.block(PARAMS):
        taken = json.get("gradient_clipping", json.get(key)) != json.get(key)
        moved = None if taken else {key: DELETE, "gradient_clipping": json.get(key)}
        yield Hit(key, "is refused by DeepSpeed", correction=moved)


@rule(
    "D18",
    "an optimizer that ZeRO has not been tested with",
    lbsgd="error",
    plain="error",
    why="ZeRO refuses every optimizer outside a short list, SGD among them, unless it is told to take it. SGD "
    "with momentum works.",
    fix="set it to true",
    example={"zero_allow_untested_optimizer": None},
)
def untested_with_zero(json: Document) -> Iterator[Hit]:
    kind = json.get(TYPE)
    name = json.optimizer if json.optimizer in json.accepted.optimizers else kind
    untested = (json.optimizer_entry or json.is_sgd) and name not in json.accepted.zero_tested
    if json.stage and untested and not json.get("zero_allow_untested_optimizer"):
        said = f"is not true, and ZeRO then refuses {kind}"
        yield Hit("zero_allow_untested_optimizer", said, correction={"zero_allow_untested_optimizer": True})
