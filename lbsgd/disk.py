"""Files that are whole or not there, whenever the process or the machine dies."""

import os
from pathlib import Path


def to_disk(path: Path) -> None:
    """Forces a file, or the names in a folder such as those just given by a rename, out of the page cache."""
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
