"""Names of runs, rows and families, as short as possible but distinct."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lbsgd.algorithm.published import IMAGENET_IMAGES
from lbsgd.report.groups import Group
from lbsgd.report.recipe import shown, that_counts
from lbsgd.report.run_log import LOG_NAME, LoggedRun
from lbsgd.units import printable

SEED = re.compile(r"seed\d+")  # the folder of a run in a row of a grid


def names_of(runs: Sequence[LoggedRun]) -> list[str]:
    """Name each run by its folder, with only as much of the path as is needed to tell the runs apart."""
    return told_apart([place_of_run(run) for run in runs])


def row_names(rows: Sequence[Group]) -> list[str]:
    """Name each row by its folder as `names_of` names runs. A row in several folders is "the first and 2 more".

    Rows that share a folder, because their seeds differ in more than the seed, have the name of their first run.
    """
    places = [list(dict.fromkeys(map(row_place_of, row.runs))) for row in rows]
    firsts = [first for first, *_ in places]
    own = [
        place_of_run(row.runs[0]) if firsts.count(first) > 1 else first for row, first in zip(rows, firsts, strict=True)
    ]
    names = told_apart(own)
    return [f"{name} and {len(more)} more" if more else name for name, (_, *more) in zip(names, places, strict=True)]


def place_of_run(run: LoggedRun) -> Path:
    """Return the path that names a run: its folder, or its log if that is not called log.jsonl."""
    path = run.path.resolve()
    return path.parent if path.name == LOG_NAME else path.with_suffix("")


def row_place_of(run: LoggedRun) -> Path:
    """Return the path that names the row of a run: NAME for NAME/log.jsonl, and for NAME/seed0/log.jsonl of a grid."""
    place = place_of_run(run)
    return place.parent if SEED.fullmatch(place.name) else place


def told_apart(places: Sequence[Path]) -> list[str]:
    names: list[str] = []
    for depth in range(1, max((len(place.parts) for place in places), default=0) + 1):
        names = ["/".join(place.parts[-depth:]) for place in places]
        if len(set(names)) == len(set(places)):
            break
    return list(map(printable, names))


def places_of(families: Sequence[Sequence[Group]]) -> list[str]:
    """Return what each family was measured on, for headings. Equal ones get the settings that tell them apart."""
    places, settings = [place_of(rows) for rows in families], [settings_of(rows[0]) for rows in families]
    found = []
    for place, own in zip(places, settings, strict=True):
        others = [other for same, other in zip(places, settings, strict=True) if same == place]
        apart = [f"{key} {shown(own[key])}" for key in own if any(other.get(key) != own[key] for other in others)]
        found.append(", ".join([place, *apart]))
    return found


def place_of(rows: Sequence[Group]) -> str:
    """Return the network, the images and the epochs of a family."""
    row = next((row for row in rows if row.finished), rows[0])  # one that diverged has no end
    planned = f"{row.runs[0].planned_epochs:.4g} epochs"
    epochs = planned if row.ended_after is None else f"{row.ended_after:.4g} of {planned}"
    return f"{row.header['model']} on {images_of(row)}, {epochs}"


def images_of(row: Group) -> str:
    images, data = row.recipe["num_images"], Path(row.header.get("environment", {}).get("data", "")).name
    if data == "fake":
        return "fake images"
    if images == IMAGENET_IMAGES:
        return "ImageNet"
    return f"{images:,} images of {printable(data.removesuffix('_ffcv')) or 'unknown data'}"


def settings_of(row: Group) -> dict[str, Any]:
    """Return the further settings that the rows of a family share (`families.family_key`)."""
    leaves = that_counts(row.recipe)
    found = {key: value for key, value in leaves.items() if key.split(".")[0] in ("decay", "augmentation")}
    found["n"], found["base_batch"] = row.recipe["batch_norm"]["per_worker_batch"], row.base_batch
    data = row.runs[0].fingerprint
    return {**found, "fingerprint": data[:8] if data else "unknown"}
