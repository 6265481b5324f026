"""What the trainer asks of the guard that watches it."""

from __future__ import annotations

from typing import Protocol


class Watcher(Protocol):
    """Receives the trainer's position and asks it to stop; `processes.guard.Guard` implements it."""

    stop_requested: str | None
    nothing_to_save: bool
    saved: bool

    def alive(self, position: str) -> None: ...
