"""Does the large batch want more updates? Table 1's baseline and large batch for three times the epochs.

At a quarter of the learning rate the large batch still ends above its baseline on CIFAR-10 (`elbow`). An epoch of it
has 48 updates there, and 156 in the paper. Hypothesis: it lacks updates, so with three times as many, and warmup and
decay at the same shares of the run, it ends at the baseline's error. Stated after the results of `elbow` were known,
and before any run of this one.
"""

from __future__ import annotations

from dataclasses import replace

from lbsgd.experiments.grid import BASELINE, Claim, DataSet, Row, Study, gradual, setting
from lbsgd.experiments.studies.elbow import lower_lr

TIMES = 3


def rows(data: DataSet) -> tuple[Row, ...]:
    epochs = TIMES * data.epochs
    longer = (
        lower_lr(data),
        setting("epochs", epochs),
        setting("decay.epochs", [TIMES * epoch for epoch in data.decay_epochs]),
    )
    warmup = setting("warmup.epochs", TIMES * data.warmup_epochs)
    large = gradual(data.large)
    return (
        replace(BASELINE, settings=longer, epochs=epochs),
        replace(large, settings=(*longer, warmup), epochs=epochs),
    )


def claims(data: DataSet) -> tuple[Claim, ...]:
    text = f"with {TIMES} times the epochs a batch {data.large} times as large ends at the baseline's error"
    return (Claim(text, f"x{data.large}", "same", "x1"),)


STUDY = Study(
    "longer",
    f"{TIMES} times the epochs at a quarter of the learning rate",
    "Figures 1 and 3",
    rows,
    claims,
    apart=True,
    table="figure1",
)
