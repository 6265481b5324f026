"""Families: rows that are compared with each other, and words for how each differs from the paper's recipe."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from lbsgd.report.groups import NOT_A_ROW, Group, by_batch, with_diverged
from lbsgd.report.names import places_of, row_names
from lbsgd.report.recipe import flat, with_defaults

SHARED = ("epochs", "iterations", "num_images", "decay", "augmentation")  # keys of the recipe that make a family
NAMED = {  # leaves that `changes_of` has words for
    *("batch_norm.scope", "batch_norm.statistics", "batch_norm.zero_last_gamma"),
    *("linear_scaling.rule", "linear_scaling.base_lr", "warmup.kind"),
    *("momentum.correction", "weight_decay.scaling", "weight_decay.on_batch_norm"),
}


@dataclass(frozen=True)
class Family:
    """Rows of one network on one data set over the same epochs.

    base_lr    the base learning rate of most rows; None if the rows are candidates for it
    names      the rows' names, from their folders
    place      what the rows were measured on, for headings
    """

    rows: tuple[Group, ...]
    base_lr: float | None
    names: tuple[str, ...]
    place: str

    @cached_property
    def baseline(self) -> Group | None:
        """The row that the others are compared with: base_batch images, nothing changed."""
        return self.find(1)

    @property
    def without_baseline(self) -> str:
        """Say why no row is the baseline, if none is. Tables that compare with the baseline are then left out."""
        if self.baseline:
            return ""
        small = [f"that with kn {row.global_batch:,} has {self.label(row)}" for row in self.rows if row.factor == 1]
        none = f"none has {self.rows[0].base_batch:,} images per update"
        return f"No row is the baseline: {', '.join(small) or none}."

    def find(self, factor: float, *changes: str) -> Group | None:
        """Return the row with this factor and exactly these changes (`changes_of`)."""
        return next((row for row in self.rows if row.factor == factor and self.changes_of(row) == set(changes)), None)

    def factors(self, *changes: str) -> list[float]:
        """Return the factors above 1 of the rows with one of these changes."""
        wanted = [{change} if change else set() for change in changes]
        return sorted({row.factor for row in self.rows if row.factor > 1 and self.changes_of(row) in wanted})

    def changes_of(self, row: Group) -> set[str]:
        """Return a row's differences from the paper's recipe, in the words of the tables."""
        recipe, changes = row.recipe, set()
        warmup, rule = recipe["warmup"]["kind"], recipe["linear_scaling"]["rule"]
        if rule != "linear":
            changes.add({"fixed": "lr not scaled", "sqrt": "square-root rule"}[rule])
        if row.factor > 1 and warmup != "gradual" and rule != "fixed":
            changes.add({"none": "no warmup", "constant": "constant warmup"}[warmup])
        if self.base_lr is None:
            changes.add(f"lr {row.lr:g}")
        elif not 0.999 < (times := row.base_lr / self.base_lr) < 1.001:
            changes.add({0.5: "half the lr", 2.0: "twice the lr"}.get(round(times, 3), f"lr x {times:g}"))
        if not recipe["batch_norm"]["zero_last_gamma"]:
            changes.add("γ = 1")
        for settings in (other_changes(recipe), self.unlike_most(row)):
            changes |= {f"{key} {value}" for key, value in settings.items()}
        if len({other.header.get("started_from") for other in self.rows}) > 1:
            changes.add(f"from {row.header.get('started_from') or 'random weights'}")
        return changes

    def unlike_most(self, row: Group) -> dict[str, Any]:
        """Return the settings that `changes_of` has no words for and in which a row differs from most runs."""
        return {key: value for key, value in further_settings(row).items() if value != self.usual_settings[key]}

    @cached_property
    def usual_settings(self) -> dict[str, Any]:
        """The further settings of most runs; of equally frequent values, the first row's."""
        counts: dict[str, Counter[Any]] = {}
        for row in self.rows:
            for key, value in further_settings(row).items():
                counts.setdefault(key, Counter())[value] += len(row.runs)
        return {key: counter.most_common(1)[0][0] for key, counter in counts.items()}

    def label(self, row: Group) -> str:
        """Return a row's name in the tables of the paper."""
        changes = sorted(self.changes_of(row))
        plain = "baseline" if row.factor == 1 else "gradual warmup" if row.factor > 1 else "small batch"
        return ", ".join(changes) if changes else plain

    def labels(self) -> list[str]:
        """Return the rows' names outside the paper's tables. They begin with the folder, which tells rows apart."""
        return [f"{name}, {self.label(row)}" for name, row in zip(self.names, self.rows, strict=True)]

    def curve_names(self) -> list[str]:
        """Return the names of the rows' curves: their labels with kn."""
        return [f"{label}, kn {row.global_batch:,}" for label, row in zip(self.labels(), self.rows, strict=True)]


def other_changes(recipe: dict[str, Any]) -> dict[str, str]:
    """Return the words for further keys whose value is not the paper's."""
    norm, momentum, decay = recipe["batch_norm"], recipe["momentum"], recipe["weight_decay"]
    found = {
        "batch norm": norm["scope"] if norm["scope"] != "worker" else "",
        "statistics": norm["statistics"] if norm["statistics"] != "average" else "",
        "momentum": "" if momentum["correction"] else "not corrected",
        "weight decay": decay["scaling"] if decay["scaling"] != "none" else "",
        "decay on batch norm": "yes" if decay["on_batch_norm"] else "",
    }
    return {key: value for key, value in found.items() if value}


def further_settings(row: Group) -> dict[str, Any]:
    """Return the settings in which two rows may differ and for which `changes_of` has no words.

    A null is left out, because its meaning follows from a key with words. Only the start of the warmup has a default.
    """
    recipe, params = with_defaults(row.recipe), row.header["config"]["optimizer"].get("params", {})
    rest = {key: block for key, block in recipe.items() if key not in NOT_A_ROW}
    if not recipe["momentum"]["correction"]:
        del rest["momentum"]  # "not corrected" already says it
    if recipe["warmup"]["kind"] == "none":
        del rest["warmup"]
    leaves = {key: value for key, value in flat(rest).items() if key not in NAMED and value is not None}
    if "warmup" in rest:
        leaves["warmup.start_fraction"] = recipe["warmup"].get("start_fraction") or "by default"
    found = {re.sub("[._]", " ", key): comparable(value) for key, value in leaves.items()}
    found["precision"] = row.header["precision"]
    if row.factor <= 1:
        found["warmup"] = recipe["warmup"]["kind"]
    found |= {key: comparable(value) for key, value in params.items() if key in ("momentum", "nesterov")}
    if recipe["weight_decay"]["scaling"] == "none":
        found["weight decay"] = comparable(params.get("weight_decay"))
    return found


def comparable(value: Any) -> Any:
    """Return a hashable value, lists and objects as text."""
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def families_of(groups: Sequence[Group]) -> list[Family]:
    """Return the rows that may be compared, most rows first."""
    alike: dict[str, dict[float | None, list[Group]]] = {}
    for group in groups:
        alike.setdefault(family_key(group), {}).setdefault(group.ended_after, []).append(group)
    families = [
        sorted(rows, key=by_batch) for by_end in alike.values() for rows in with_diverged(by_end, lambda row: row.lost)
    ]
    families.sort(key=lambda rows: -len(rows))
    names = iter(row_names([row for rows in families for row in rows]))
    return [
        Family(tuple(rows), common_lr(rows), tuple(islice(names, len(rows))), place)
        for rows, place in zip(families, places_of(families), strict=True)
    ]


def family_key(group: Group) -> str:
    """Return a key of everything that the rows of a family share, except where they ended."""
    shared = {key: group.recipe.get(key) for key in SHARED}
    n, fingerprint = group.recipe["batch_norm"]["per_worker_batch"], group.runs[0].fingerprint
    return json.dumps([group.header["model"], shared, n, group.base_batch, fingerprint], sort_keys=True)


def common_lr(rows: Sequence[Group]) -> float | None:
    """Return the base_lr that most rows have. If several tie, return the middle one, the reference of a table of lrs.

    If several tie and all batches are small, the rows are candidates: return None, because no lr is chosen yet.
    """
    counts = Counter(row.base_lr for row in rows)
    most = max(counts.values())
    common = sorted(lr for lr, count in counts.items() if count == most)
    candidates = len(common) > 1 and all(row.factor <= 1 for row in rows)
    return None if candidates else common[len(common) // 2]
