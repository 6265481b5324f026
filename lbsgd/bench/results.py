"""Write the results of a bench into files after each figure, so that a killed run leaves what it had."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lbsgd.bench.figure import Figure
from lbsgd.disk import replace_file
from lbsgd.errors import ConfigError
from lbsgd.report.bench_picture import DPI, bench_picture
from lbsgd.report.bench_tables import paragraphs
from lbsgd.report.picture import replace_picture


@dataclass
class PartResult:
    """The state and the results of one part.

    state    waiting, running, done, failed, "out of time", or "not run" if it cannot run here
    why      the reason if it is not done
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
    """The results of one bench in a folder: NAME.json, NAME.md, NAME.png, NAME.log. They replace those of earlier runs.

    about: the device, the versions and the command. Raises ConfigError if the folder cannot be written.
    """

    def __init__(self, folder: Path, name: str, about: Mapping[str, Any]):
        self.folder, self.name, self.about = folder, name, dict(about)
        self.parts: list[PartResult] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for written_later in (self.picture, self.log):
                written_later.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write in {folder} ({error.strerror}); choose another --output_dir") from None

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def picture(self) -> Path:
        return self.folder / f"{self.name}.png"

    @property
    def title(self) -> str:
        return f"{self.name} on {self.about['device']}"

    def announce(self, name: str, title: str) -> PartResult:
        """Add a part that will run."""
        self.parts.append(PartResult(name, title))
        self.write()
        return self.parts[-1]

    def write(self) -> None:
        """Write the current JSON and Markdown, each whole or not at all. Raises ConfigError if the disk fails."""
        found = {**self.about, "written": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        facts = "\n".join(f"* {key}: {value}" for key, value in found.items())
        head = f"# {self.title}\n\n{facts}\n\n"
        data = json.dumps({**found, "parts": [part.as_dict() for part in self.parts]}, indent=1, ensure_ascii=False)
        page = head + "\n".join(map(PartResult.markdown, self.parts))
        try:
            replace_file(self.folder / f"{self.name}.json", data.encode())
            replace_file(self.folder / f"{self.name}.md", page.encode())
        except OSError as error:
            raise ConfigError(f"cannot write in {self.folder} ({error.strerror}); make room and begin again") from None

    def draw(self) -> None:
        """Draw the figures, if there are any, with their intervals and goals."""
        picture = bench_picture(self.title, [part.as_dict() for part in self.parts])
        if picture:
            replace_picture(self.picture, picture, dpi=DPI, metadata={"Software": None})
