"""The results of a bench as files, written again with each figure: a run that is killed leaves what it had."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any

from lbsgd.bench.figure import Figure
from lbsgd.disk import replace_file
from lbsgd.errors import ConfigError
from lbsgd.report.bench_tables import paragraphs


@dataclass
class PartResult:
    """What is known of one part.

    state    waiting, running, done, failed, "out of time" or "not run", because it cannot run here; `why` says why
             it is not done
    notes    lines for the reader
    """

    name: str
    title: str
    state: str = "waiting"
    why: str = ""
    seconds: float = 0.0
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "figures": [figure.as_dict() for figure in self.figures]}

    def markdown(self) -> str:
        return paragraphs(f"## {self.title}", self.as_dict(), f"**{self.state}**")


class Results:
    """The results of one bench in a folder: NAME.json, NAME.md and NAME.png.

    about: the device, the versions and the command. Raises ConfigError where the folder cannot be written.
    """

    def __init__(self, folder: Path, name: str, about: Mapping[str, Any]):
        self.folder, self.name, self.about = folder, name, dict(about)
        self.parts: list[PartResult] = []
        self.writing = RLock()  # parts that run at once write too
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make {folder} ({error.strerror}); choose another --output_dir") from None

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def announce(self, name: str, title: str) -> PartResult:
        """Add a part that is to run."""
        self.parts.append(PartResult(name, title))
        self.write()
        return self.parts[-1]

    def write(self) -> None:
        """Write the JSON and the Markdown as they are now, each whole."""
        found = {**self.about, "written": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        facts = "\n".join(f"* {key}: {value}" for key, value in found.items())
        head = f"# {self.name} on {self.about['device']}\n\n{facts}\n\n"
        with self.writing:
            data = json.dumps({**found, "parts": [part.as_dict() for part in self.parts]}, indent=1, ensure_ascii=False)
            replace_file(self.folder / f"{self.name}.json", data.encode())
            page = head + "\n".join(map(PartResult.markdown, self.parts))
            replace_file(self.folder / f"{self.name}.md", page.encode())

    def draw(self) -> None:
        """Draw each part's figures with their intervals and goals."""
        with self.writing:
            self._draw()

    def _draw(self) -> None:
        from matplotlib.figure import Figure as Picture

        from lbsgd.report.picture import replace_picture

        drawn = [part for part in self.parts if part.figures]
        if not drawn:
            return
        heights = [1 + 0.35 * len(part.figures) for part in drawn]
        picture = Picture(figsize=(10, sum(heights) + 0.5), layout="constrained")
        picture.suptitle(f"{self.name} on {self.about['device']}")
        panels = picture.subplots(len(drawn), 1, height_ratios=heights, squeeze=False)[:, 0]
        for axes, part in zip(panels, drawn, strict=True):
            draw_part(axes, part)
        replace_picture(self.folder / f"{self.name}.png", picture)


def draw_part(axes: Any, part: PartResult) -> None:
    """Draw the figures of one part below each other; a goal is a red bar at its bound."""
    for place, each in enumerate(part.figures):
        low, high = (each.value, each.value) if each.low is None or each.high is None else (each.low, each.high)
        axes.errorbar([each.value], [place], xerr=[[each.value - low], [high - each.value]], fmt="o", capsize=4)
        if each.goal:
            axes.plot([each.goal.bound], [place], "|", color="red", markersize=16)
    units = sorted({each.unit for each in part.figures if each.unit})
    axes.set_yticks(range(len(part.figures)), [each.name for each in part.figures])
    axes.set(title=part.title, xlabel=", ".join(units) or "ratio")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
