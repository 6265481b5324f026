"""Images in folders on a real disk: one folder per class, images at any depth, also through symbolic links.

People make subsets by links to class folders elsewhere, so links are followed. A link is left out if it leads back to a
folder that holds it, or to a folder that its class has already. A folder that would belong to two classes is refused.
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
from lbsgd.errors import DataError

Identity = tuple[int, int]  # device and inode


def in_folders(folder: Path) -> ByClass | None:
    """Return the images of a folder by its class folders; others are loose. None if the folder is not there."""
    if not folder.is_dir():
        return None
    walk = _Walk(folder)
    for name in sorted(walk.list_folder("", None)) + sorted(walk.links):
        walk.add_class(name)
    return walk.found


def has_class_folders(folder: Path) -> bool:
    """Return whether a folder is there and holds any that may be a class."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        return any(_is_folder(entry) and not folder_reason(entry.name) for entry in entries)
    return False


def has_images(folder: Path) -> bool:
    """Return whether a folder is there and holds class folders, or images that lie in none."""
    return has_class_folders(folder) or folder.is_dir() and not all(map(file_reason, os.listdir(folder)))


class _Walk:
    """Goes through a folder. Real folders come before links, so that an image goes by the name of its own place."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, Files("stamps")
        self.found = ByClass(self.files, folder, str(folder))
        real = folder.resolve()
        self.above = {_identity(place) for place in (real, *real.parents)}
        self.class_of: dict[Identity, str] = {}  # of each folder that has been entered
        self.links: list[str] = []  # to folders, not yet followed

    def add_class(self, name: str) -> None:
        self.links, waiting = [], [name]
        while waiting or self.links:
            place = waiting.pop() if waiting else self.links.pop(0)
            if self._is_new(place, name):
                waiting += self.list_folder(place, name)
                self.links.sort()

    def _is_new(self, place: str, class_name: str) -> bool:
        """Return whether to enter a folder. Raises DataError if another class has it already."""
        identity = _identity(self.folder / place)
        if identity in self.above or self.class_of.get(identity) == class_name:
            self.found.left_out.add(REPEATED_FOLDER, place)
            return False
        if place == class_name:
            self.found.numbers[class_name] = len(self.found.numbers)  # also if it is empty, which is refused later
        if other := self.class_of.get(identity):
            raise DataError(
                f"{self.folder / place} is a folder that class {other} holds as well, so its images would have two "
                f"classes; remove one of the links"
            )
        self.class_of[identity] = class_name
        return True

    def list_folder(self, place: str, class_name: str | None) -> list[str]:
        """Add the images of a folder, and return the folders in it; links to folders wait in `links`."""
        folders: list[str] = []
        with os.scandir(self.folder / place) as entries:
            for entry in entries:
                path = f"{place}/{entry.name}" if place else entry.name
                if entry.is_symlink() and not folder_reason(entry.name):
                    followed(self.folder / path)  # a broken one may have been a class folder, whatever its name
                if not _is_folder(entry):
                    self._add_file(path, class_name)
                elif reason := folder_reason(entry.name):
                    self.found.left_out.add(reason, path)
                else:
                    (self.links if entry.is_symlink() else folders).append(path)
        return folders

    def _add_file(self, name: str, class_name: str | None) -> None:
        """Raises DataError for anything but a plain file: to read a pipe, for example, would wait for ever."""
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
    """Return the status of what a path leads to. Raises DataError for a link to nothing, else OSError."""
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
    with contextlib.suppress(OSError):  # a link that leads nowhere or in a circle
        return entry.is_dir()
    return False


def _identity(path: Path) -> Identity:
    info = os.stat(path)
    return info.st_dev, info.st_ino
