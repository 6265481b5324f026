"""The settings that determine a conversion's result, together with its source."""

from __future__ import annotations

from dataclasses import dataclass

from lbsgd.errors import ConfigError

MAX_SIDE = 65_535  # FFCV stores sizes as uint16


@dataclass(frozen=True)
class Settings:
    """How images are shrunk and encoded. Raises ConfigError for settings that cannot be right."""

    max_side: int | None = None  # pixels of the longer side, FFCV's convention
    short_side: int | None = None  # pixels of the shorter side, like torchvision's Resize
    quality: int = 90
    raw_fraction: float = 0.0  # of the images, kept as pixels (FFCV's proportion mode)
    reencode: bool = False  # every JPEG, even one that could be kept untouched

    def __post_init__(self) -> None:
        if (self.max_side is None) == (self.short_side is None):
            raise ConfigError("images are shrunk by --max_side or by --short_side: give one of the two")
        if not 1 <= self.side <= MAX_SIDE:
            flag = "--max_side" if self.short_side is None else "--short_side"
            raise ConfigError(f"{flag} {self.side} is not 1 to {MAX_SIDE:,} pixels")
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"--quality {self.quality} is not 1 to 100")
        if not 0 <= self.raw_fraction <= 1:
            raise ConfigError(f"--raw_fraction {self.raw_fraction} is not 0 to 1")

    @property
    def side(self) -> int:
        """The given one of max_side and short_side."""
        return self.max_side or self.short_side or 0

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Return the (width, height) at which an image is kept. It is never enlarged, and each is at least 1 pixel."""
        now = max(width, height) if self.short_side is None else min(width, height)
        if now <= self.side:
            return width, height
        if self.short_side is None:
            ratio = self.side / now  # FFCV's arithmetic, to get FFCV's sizes
            return max(1, int(ratio * width)), max(1, int(ratio * height))
        return max(1, self.side * width // now), max(1, self.side * height // now)  # rounded down, as torchvision does

    def is_raw(self, index: int) -> bool:
        """Return whether image `index` is kept as pixels. These images are evenly spread, so each class has a share."""
        return int((index + 1) * self.raw_fraction) > int(index * self.raw_fraction)
