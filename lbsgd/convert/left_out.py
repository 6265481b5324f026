"""Decide which names among the images are left out and why, and count them.

Real disks hold folders of thumbnails, of editors and of file systems, and ._NAME files in which macOS keeps attributes.
None of these becomes a class or an image. All of them are counted, and an example of each kind is printed.
"""

from __future__ import annotations

from lbsgd.units import counted

# torchvision's suffixes, and .jfif, which browsers on Windows give to JPEGs
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

HIDDEN_FOLDER = "hidden folder"  # .git, .ipynb_checkpoints, @eaDir
SYSTEM_FOLDER = "system folder"
REPEATED_FOLDER = "repeated folder"  # a link to a folder that is already included, or that holds the link
APPLE_DOUBLE = "AppleDouble file"
HIDDEN_FILE = "hidden file"
OTHER_FILE = "non-image file"  # by its suffix
PHOTOS = tuple(".gif .heic .heif .avif .jxl .jp2 .dng .cr2 .nef .arw".split())  # images that are not read
STRAY_FILE = "stray file"  # an image next to the class folders
MISSING_IMAGE = "missing image"  # that has a label, but is not there
OTHER_SOURCE = "other source"  # of the same split, next to the one that is read, such as an archive unpacked there
SYSTEM_FOLDERS = frozenset(
    ("__macosx", "__pycache__", "lost+found", "$recycle.bin", "#recycle", "#snapshot", "~snapshot")
    + ("system volume information", "found.000")
)


def folder_reason(name: str) -> str | None:
    """Return why a folder of this name is left out, or None if it is kept."""
    if name.startswith((".", "@")):
        return HIDDEN_FOLDER
    return SYSTEM_FOLDER if name.lower() in SYSTEM_FOLDERS else None


def file_reason(name: str) -> str | None:
    """Return why a file of this name is left out, or None if it counts as an image."""
    if name.startswith("._"):
        return APPLE_DOUBLE
    if name.startswith("."):
        return HIDDEN_FILE
    if name.lower().endswith(SUFFIXES):
        return None
    return next((f"{suffix} file" for suffix in PHOTOS if name.lower().endswith(suffix)), OTHER_FILE)


def path_reason(path: str) -> tuple[str, str] | None:
    """Return (reason, the folder or file to blame) for a file that is left out, or None for an image."""
    *folders, name = path.split("/")
    for depth, folder in enumerate(folders, 1):
        if reason := folder_reason(folder):
            return reason, "/".join(folders[:depth])
    reason = file_reason(name)
    return (reason, path) if reason else None


class LeftOut:
    """Counts what one split leaves out, by reason."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.examples: dict[str, str] = {}
        self._folders: set[str] = set()

    def add(self, reason: str, path: str) -> None:
        """Count a file or a folder. A folder counts once, although an archive names it once per file."""
        if reason in (HIDDEN_FOLDER, SYSTEM_FOLDER):
            if path in self._folders:
                return
            self._folders.add(path)
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.examples[reason] = min(path, self.examples.get(reason, path))

    def __str__(self) -> str:
        """`2 hidden folders (such as cat/.git), 1 AppleDouble file (cat/._1.jpg)`; empty if nothing is left out."""
        listed = ", ".join(
            f"{counted(self.counts[reason], reason)} ({'such as ' * (self.counts[reason] > 1)}{self.examples[reason]})"
            for reason in sorted(self.counts)
        )
        photos = [suffix for suffix in PHOTOS if f"{suffix} file" in self.counts]
        return f"{listed}; to keep {', '.join(photos)}, make JPEGs of them first" if photos else listed
