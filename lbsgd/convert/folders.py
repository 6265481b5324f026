"""Find images in folders: one folder per class, with images at any depth and behind symbolic links.

People make subsets out of links to class folders elsewhere, so links are followed. A link is left out if it leads back
to a folder that holds it, or to a folder that its class already has. A folder that would belong to two classes is
refused.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from lbsgd.convert.archives import MAX_IMAGE_BYTES
from lbsgd.convert.by_class import ByClass
from lbsgd.convert.files import Files
from lbsgd.convert.left_out import REPEATED_FOLDER, file_reason, folder_reason
from lbsgd.disk import is_dir
from lbsgd.errors import DataError

Identity = tuple[int, int]  # device and inode


def in_folders(folder: Path) -> ByClass | None:
    """Return a folder's images by its class folders, other images as loose. None if the folder does not exist."""
    if not is_dir(folder):
        return None
    walk = _Walk(folder)
    for name in sorted(walk.list_folder("", None)) + sorted(walk.links):
        walk.add_class(name)
    return walk.found


def has_class_folders(folder: Path) -> bool:
    """Return whether a folder exists and holds a folder that may be a class."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        return any(_is_folder(entry) and not folder_reason(entry.name) for entry in entries)
    return False


def has_images(folder: Path) -> bool:
    """Return whether a folder exists and holds class folders or loose images."""
    return has_class_folders(folder) or is_dir(folder) and not all(map(file_reason, os.listdir(folder)))


class _Walk:
    """Walks a folder, real folders before links, so that each image is named by its own place."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, Files("stamps")
        self.found = ByClass(self.files, folder, str(folder))
        real = folder.resolve()
        self.above = {_identity(place) for place in (real, *real.parents)}
        self.class_of: dict[Identity, str] = {}  # of each folder entered
        self.links: list[str] = []  # to folders, not yet followed

    def add_class(self, name: str) -> None:
        self.links, waiting = [], [name]
        while waiting or self.links:
            place = waiting.pop() if waiting else self.links.pop(0)
            if self._is_new(place, name):
                waiting += self.list_folder(place, name)
                self.links.sort()

    def _is_new(self, place: str, class_name: str) -> bool:
        """Return whether to enter a folder. Raises DataError if another class already has it."""
        identity = _identity(self.folder / place)
        if identity in self.above or self.class_of.get(identity) == class_name:
            self.found.left_out.add(REPEATED_FOLDER, place)
            return False
        if place == class_name:
            self.found.numbers[class_name] = len(self.found.numbers)  # even if it is empty, which is refused later
        if other := self.class_of.get(identity):
            raise DataError(
                f"{self.folder / place} is a folder that class {other} holds as well, so its images would have two "
                f"classes; remove one of the links"
            )
        self.class_of[identity] = class_name
        return True

    def list_folder(self, place: str, class_name: str | None) -> list[str]:
        """Add a folder's images and return the folders in it. Links to folders go to `links`."""
        folders: list[str] = []
        with os.scandir(self.folder / place) as entries:
            for entry in entries:
                path = f"{place}/{entry.name}" if place else entry.name
                if entry.is_symlink() and not folder_reason(entry.name):
                    followed(self.folder / path)  # raises if broken: any broken link may have been a class folder
                if not _is_folder(entry):
                    self._add_file(path, class_name)
                elif reason := folder_reason(entry.name):
                    self.found.left_out.add(reason, path)
                else:
                    (self.links if entry.is_symlink() else folders).append(path)
        return folders

    def _add_file(self, name: str, class_name: str | None) -> None:
        """Add a file if it is an image. Raises DataError for a pipe or the like, because reading it may never end."""
        if reason := file_reason(name.rpartition("/")[2]):
            self.found.left_out.add(reason, name)
            return
        path = self.folder / name
        info = followed(path)
        if not stat.S_ISREG(info.st_mode):
            raise DataError(f"{path} is not a plain file; remove it")
        if info.st_size > MAX_IMAGE_BYTES:
            raise DataError(f"{path} is larger than {MAX_IMAGE_BYTES:,} bytes, and no image; remove it")
        row = len(self.files)
        self.files.add(name, sizes=info.st_size, stamps=info.st_mtime_ns)
        if class_name is None:
            self.found.loose.append(row)
        else:
            self.found.add(row, class_name)


def followed(path: Path) -> os.stat_result:
    """Return the status of the file that a path leads to. Raises DataError for a broken link, else OSError."""
    try:
        return os.stat(path)
    except OSError as error:
        if path.is_symlink():
            raise DataError(
                f"{path} is a link to {os.readlink(path)}, which cannot be read ({error.strerror}); remove it, or "
                f"bring back the disk that it leads to"
            ) from error
        raise


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with contextlib.suppress(OSError):  # a broken or circular link
        return entry.is_dir()
    return False


def _identity(path: Path) -> Identity:
    info = os.stat(path)
    return info.st_dev, info.st_ino
