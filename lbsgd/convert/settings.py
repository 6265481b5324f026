"""The settings that a conversion depends on, besides its source."""

from __future__ import annotations

from dataclasses import dataclass

from lbsgd.errors import ConfigError

MAX_SIDE = 65_535  # FFCV's sizes are uint16


@dataclass(frozen=True)
class Settings:
    """What the result depends on, besides the source: how images are shrunk, and which are kept as what."""

    max_side: int | None = None  # pixels of the longer side, FFCV's convention
    short_side: int | None = None  # pixels of the shorter side, torchvision's Resize
    quality: int = 90
    raw_fraction: float = 0.0  # of the images, kept as pixels (FFCV's proportion mode)
    reencode: bool = False  # every JPEG, also one that could be kept untouched

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
        return self.short_side if self.max_side is None else self.max_side

    def size(self, width: int, height: int) -> tuple[int, int]:
        """The size that an image is kept in; it is never enlarged, and never less than one pixel."""
        now = max(width, height) if self.short_side is None else min(width, height)
        if now <= self.side:
            return width, height
        ratio = self.side / now  # FFCV's arithmetic, so that sizes are FFCV's, and rounded down as torchvision does
        if self.short_side is None:
            return max(1, int(ratio * width)), max(1, int(ratio * height))
        return tuple(max(1, self.side * side // now) for side in (width, height))

    def is_raw(self, index: int) -> bool:
        """Whether image `index` is kept as pixels: evenly spread, so that each class has its share of them."""
        return int((index + 1) * self.raw_fraction) > int(index * self.raw_fraction)
