"""Rules for large-minibatch SGD in a plain JSON, which shows its intent by its numbers only (Sec. 2.1, 2.2, 5.1)."""

from __future__ import annotations

from collections.abc import Iterator

from lbsgd.algorithm import published
from lbsgd.config.checks.deepspeed_warmup import highest_rate
from lbsgd.config.checks.rule import Hit, rule
from lbsgd.config.checks.subject import Document
from lbsgd.config.keypath import is_count, is_number


def large_batch(json: Document) -> int | None:
    """Return SGD's global batch if it is larger than the paper's baseline of 256 images, else None."""
    kn = json.get("train_batch_size")
    return kn if json.is_sgd and is_count(kn) and kn > 256 else None


@rule(
    "D53",
    "a learning rate too small for a large minibatch",
    plain="note",
    why="The linear scaling rule multiplies the learning rate by the same factor as the minibatch: 0.1 for 256 "
    "images, 3.2 for 8192 (Sec. 2.1). With ResNet-50 on ImageNet the paper lost 17.93 points with a fixed "
    "learning rate and 2.48 with the square root rule (Table 2a).",
    fix="scale it with the batch (Sec. 2.1)",
    example={
        "train_batch_size": 8192,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1}},
    },
)
def unscaled_learning_rate(json: Document) -> Iterator[Hit]:
    kn, (key, lr) = large_batch(json), highest_rate(json)
    cost = published.points_of_lr(kn, lr) if kn and is_number(lr) else None
    if kn and cost and cost[1] in ("fixed", "sqrt"):
        points, _ = cost
        said = f"is {lr:g} for {kn} images, where the linear rule gives {0.1 * kn / 256:g}"
        yield Hit(key, f"{said}; with this the paper lost {points:g} points (Table 2a)", points=points)


@rule(
    "D52",
    "a large minibatch without warmup",
    plain="note",
    why="The full learning rate of a large minibatch is too large for the first epochs, in which the network "
    "changes fast. Without warmup the paper lost 1.1 points at 8192 images (Table 1).",
    fix="WarmupLR, linear, over 5 epochs, unless your program has a schedule",
    example={"train_batch_size": 8192, "optimizer": {"type": "SGD", "params": {"lr": 3.2}}},
)
def no_warmup(json: Document) -> Iterator[Hit]:
    kn = large_batch(json)
    if kn and json.get("scheduler.type") is None:
        lost = published.loss_of(published.NO_WARMUP, kn)
        at = f"{lost.points:g} points at {lost.global_batch} images"
        said = f"is not given: without warmup the paper lost {at} (Table 1)"
        yield Hit("scheduler", said, points=lost.points_at(kn))


@rule(
    "D54",
    "a large minibatch without decay",
    plain="note",
    why="WarmupLR stays at its last learning rate for ever. The paper divides it by 10 at epochs 30, 60 and 80 "
    "(Sec. 5.1); no scheduler of DeepSpeed does.",
    fix="decay it in your program, as by 10 at epochs 30, 60 and 80 (Sec. 5.1), or use lbsgd.initialize",
    example={
        "train_batch_size": 8192,
        "optimizer": {"type": "SGD", "params": {"lr": 3.2}},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0.1, "warmup_max_lr": 3.2, "warmup_type": "linear"},
        },
    },
)
def no_decay(json: Document) -> Iterator[Hit]:
    if large_batch(json) and json.get("scheduler.type") == "WarmupLR":
        yield Hit("scheduler.type", "is WarmupLR, which holds its last learning rate for ever")
