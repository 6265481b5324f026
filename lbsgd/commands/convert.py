"""`lbsgd convert`: your copy of ImageNet -> the FFCV files that training reads."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from lbsgd.commands.flag_types import OneLineParser, fraction, named, positive
from lbsgd.commands.reader import reader_may_leave
from lbsgd.errors import ConfigError, DataError, one_line
from lbsgd.output import require_output, say
from lbsgd.processes.signals import stoppable

DESCRIPTION = """
Make train.beton, val.beton and manifest.json in --data_dir ($IMAGENET_FFCV_DIR, else data/imagenet_ffcv) from your
copy of ImageNet in --source ($IMAGENET_DIR, else data/imagenet):

  train/<class>/* and val/<class>/*, as folders or in one tar
  ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and the devkit's archive
  Kaggle's folders or .tar.gz with its annotations or LOC_val_solution.csv beside
  shards: TFRecords, WebDataset, parquet

Archives are read in place. What is left out, such as hidden folders, is counted and reported. After an interruption,
the same command goes on from where it was.
"""
VERIFYING = ("data_dir", "source", "num_processes", "verify")  # the flags allowed with --verify
SIZES = ("max_side", "short_side", "quality", "raw_fraction", "reencode")


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.description = DESCRIPTION
    add = command.add_argument
    add("--source", type=named, metavar="PATH", help="folder or tar to read, see above")
    add("--data_dir", type=named, metavar="DIR", help="where the FFCV files go")
    look = "list the source, estimate size and time, say what would be refused; write nothing"
    add("--dry_run", action="store_true", help=look)
    add(
        "--verify",
        action="store_true",
        help="read back all images of --data_dir; with --source, compare them with the source",
    )
    add("--max_side", type=positive, metavar="PIXELS", help="shrink images whose longer side is longer (default: 500)")
    add(
        "--short_side",
        type=positive,
        metavar="PIXELS",
        help="instead of --max_side: shrink images whose shorter side is longer",
    )
    quality = "quality of JPEGs that are encoded again, 1 to 100 (default: 90)"
    add("--quality", type=positive, default=90, metavar="Q", help=quality)
    add(
        "--raw_fraction",
        type=fraction,
        default=0.0,
        metavar="F",
        help="fraction of images kept as pixels: faster to read, much larger",
    )
    add("--reencode", action="store_true", help="encode all JPEGs, even those that could be kept untouched")
    on_error = "what to do about images that cannot be decoded, once all are listed (default: fail)"
    add("--on_error", choices=("fail", "skip"), default="fail", help=on_error)
    subset = "take validation images of some classes only, as in ImageNet-5k; errors are then among these classes"
    add("--val_subset", action="store_true", help=subset)
    add("--num_processes", "--num_workers", type=positive, metavar="N", help="processes that convert (default: cores)")
    add("--overwrite", action="store_true", help="replace the content of the data folder")


def parser() -> argparse.ArgumentParser:
    flags = OneLineParser(prog="lbsgd convert")
    add_arguments(flags)
    return flags


def run(given: argparse.Namespace) -> int:
    """Convert, look or verify. Raises LbsgdError."""
    require_output()
    try:
        with stoppable("the same command goes on"):  # covers the import of NumPy, too
            convert_look_or_verify(given)
    except ImportError as error:
        hint = "run `make setup`, or `pip install 'lbsgd[ffcv]'`"
        raise DataError(f"the converter needs OpenCV and Pillow ({one_line(error)}); {hint}") from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise DataError(f"{where}{error.strerror or error}; mend it, and the same command goes on") from None
    return 0


def convert_look_or_verify(given: argparse.Namespace) -> None:
    from lbsgd.convert.convert import convert, look  # imported late, so that --help does not wait for NumPy
    from lbsgd.convert.verify import verify
    from lbsgd.data.folder import data_folder

    data_dir, num_processes = data_folder(given.data_dir), given.num_processes
    if given.verify:
        refuse_beside_verify(given)
        return verify(data_dir, num_processes, given.source and Path(given.source))
    source = Path(given.source or os.environ.get("IMAGENET_DIR") or "data/imagenet")
    sizes = {name: getattr(given, name) for name in SIZES}
    if sizes["max_side"] is None and sizes["short_side"] is None:
        sizes["max_side"] = 500
    wanted = {
        "on_error": given.on_error,
        "overwrite": given.overwrite,
        "val_subset": given.val_subset,
        **sizes,
    }
    if given.dry_run:
        with reader_may_leave():
            return say(*look(source, data_dir, num_processes, **wanted).split("\n"))
    return convert(source, data_dir, num_processes=num_processes, **wanted)


def refuse_beside_verify(given: argparse.Namespace) -> None:
    """Raise ConfigError for the first flag that is not allowed with --verify."""
    for name, default in vars(parser().parse_args([])).items():
        if name not in VERIFYING and getattr(given, name) != default:
            raise ConfigError(
                f"--verify does not go with --{name}: it takes the settings from the folder's manifest.json, "
                f"and changes nothing"
            )
