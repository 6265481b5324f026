"""Pictures as files, and the colours of their curves."""

from __future__ import annotations

import os
import warnings
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbsgd.disk import rewrite_file
from lbsgd.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("png", "svg", "pdf")
# Okabe and Ito's colours, which colour-blind readers can tell apart. Their yellow is too light for a thin line.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def empty_picture(**layout: Any) -> Figure:
    """Return an empty Matplotlib figure, which no window or notebook shows.

    The figure needs no backend, so MPLBACKEND is ignored: Jupyter sets it for every command that it runs, and a
    Matplotlib without Jupyter's backend cannot be imported then.

    Raises ConfigError if Matplotlib finds no folder for its configuration.
    """
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.figure import Figure  # late: it takes half a second, and tables alone do not need it
    except OSError:
        raise ConfigError(
            "no picture can be drawn, because Matplotlib finds no folder that it can write into: set TMPDIR or "
            "MPLCONFIGDIR to one"
        ) from None
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return Figure(**layout)


def replace_picture(path: Path, picture: Figure, dpi: int = 150, **how: Any) -> None:
    """Write a picture, whole or not at all. Raises ConfigError for another kind, and if it cannot be written.

    how: arguments of savefig. A letter that the font lacks becomes a box, without a warning.
    """
    kind = path.suffix.lstrip(".").lower()
    if kind not in KINDS:  # Matplotlib's other kinds need programs or libraries that may be missing
        raise ConfigError(f"{path}: no picture of that kind can be drawn; choose .png, .svg or .pdf")
    image = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        picture.savefig(image, format=kind, dpi=dpi, **how)
    try:
        rewrite_file(path, image.getvalue())
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; choose another place") from error
