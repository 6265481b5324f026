"""One large step against k small ones from the same weights in the first epochs, with and without warmup (Sec. 2.2)."""

from __future__ import annotations

from lbsgd.experiments.grid import Claim, DataSet, Row, Study, setting
from lbsgd.report.groups import Group
from lbsgd.report.page import Chart, Section, Series

SCRIPT, EPOCHS = "recipes/update_magnitude.py", 6


def rows(data: DataSet) -> tuple[Row, ...]:
    if data.name != "digits":
        return ()  # the recipe's network is for the digits only
    none = (setting("warmup", {"kind": "none", "epochs": 0}),)
    return (
        Row(f"x{data.large}_steps_gradual", data.large, (), SCRIPT, epochs=EPOCHS, is_simulated=True),
        Row(f"x{data.large}_steps_no_warmup", data.large, none, SCRIPT, epochs=EPOCHS, is_simulated=True),
    )


def claims(data: DataSet) -> tuple[Claim, ...]:
    return ()  # a figure that the paper does not have


def sections(data: DataSet, groups: dict[str, Group]) -> list[Section]:
    """Return how far the large step lies from the small ones, and how long both are."""
    labels = {name: "no warmup" if name.endswith("no_warmup") else "gradual warmup" for name in groups}
    apart = [mean_of(labels[name], group, relative) for name, group in groups.items()]
    sizes = [
        mean_of(f"{labels[name]}, {kind}", group, lambda record, key=key: record[key])
        for name, group in groups.items()
        for kind, key in (("large step", "large_sq"), ("k small steps", "small_sq"))
    ]
    note = (
        "|Δ - Δ'|² / |Δ'|² of one step at kn images and k steps at n images: 0 where the linear rule's assumption holds"
    )
    charts = [
        Chart("distance of the two, mean over seeds", apart, log=True),
        Chart("squared length of the two, mean over seeds", sizes, log=True),
    ]
    return [Section("Why warmup: one large step and k small ones", note, charts=charts)]


def relative(record: dict) -> float | None:
    apart, small = record["apart_sq"], record["small_sq"]
    return apart / small if apart is not None and small else None


def mean_of(name: str, group: Group, value) -> Series:
    """Return the mean over seeds at iterations where every seed has a number. The log has null for NaN and infinity."""
    runs = group.shown
    columns = zip(*([record for record in run.iterations if "apart_sq" in record] for run in runs), strict=False)
    values = [(column[0]["epoch"], [value(record) for record in column]) for column in columns]
    known = [(epoch, numbers) for epoch, numbers in values if None not in numbers]
    return Series(name, [epoch for epoch, _ in known], [sum(numbers) / len(numbers) for _, numbers in known])


STUDY = Study("update-magnitude", "one large step and k small ones", "Sec. 2.1 and 2.2", rows, claims, sections)
