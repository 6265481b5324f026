"""Files that are whole or not there, whenever the process or the machine dies."""

import os
from io import BytesIO
from pathlib import Path

from lbsgd.errors import ConfigError


def to_disk(path: Path) -> None:
    """Force a file, or the names in a folder such as one that a rename has just given, out of the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """Write a whole file: it holds the old bytes or the new ones, whenever the process or the machine dies."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    to_disk(temporary)
    os.replace(temporary, path)


def replace_picture(path: Path, figure) -> None:
    """Write a whole picture of a Matplotlib figure. Raises ConfigError for a name of another kind, else OSError."""
    kind, image = path.suffix.lstrip(".").lower(), BytesIO()
    if kind not in figure.canvas.get_supported_filetypes():
        raise ConfigError(f"{path}: no picture of that kind can be drawn; choose .png, .svg or .pdf")
    figure.savefig(image, format=kind, dpi=150)
    replace_file(path, image.getvalue())
