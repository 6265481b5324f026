"""python tools/convert_imagenet_to_ffcv.py [--source PATH] [--data_dir DIR] [--dry_run] [--verify]

Makes train.beton, val.beton and manifest.json in --data_dir ($IMAGENET_FFCV_DIR, else data/imagenet_ffcv) from what
--source ($IMAGENET_DIR, else data/imagenet) holds: train/<class>/* and val/<class>/*, as folders or in one tar;
ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and the devkit's archive; or Kaggle's ILSVRC/Data/CLS-LOC with
LOC_val_solution.csv. Archives are read where they are. Interrupted, the same command goes on from where it was.
"""

import argparse
import os
import sys
from pathlib import Path

from lbsgd.data.folder import data_folder
from lbsgd.errors import ConfigError, LbsgdError, print_error

VERIFYING = ("data_dir", "source", "num_workers", "verify")  # the flags that --verify goes with
SIZES = ("max_side", "short_side", "quality", "raw_fraction", "reencode")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One line, as of all that is refused."""
        self.exit(2, f"error: {message}; --help lists the flags\n")


def parser() -> argparse.ArgumentParser:
    flags = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = flags.add_argument
    add("--source", metavar="PATH", help="a folder or a tar, see above")
    add("--data_dir", metavar="DIR", help="where the FFCV files go")
    add("--dry_run", action="store_true", help="say what was found, the result's size and the time; write nothing")
    add("--verify", action="store_true", help="read all images of --data_dir back; with --source, compare them with it")
    add("--max_side", type=int, metavar="PIXELS", help="shrink images with a longer side than this (default: 500)")
    add(
        "--short_side", type=int, metavar="PIXELS", help="instead: shrink images whose shorter side is longer than this"
    )
    add("--quality", type=int, default=90, help="of JPEGs that are encoded again, 1 to 100 (default: 90)")
    add("--raw_fraction", type=float, default=0.0, help="of the images, kept as pixels: faster to read, much larger")
    add("--reencode", action="store_true", help="all JPEGs, also those that could be kept untouched")
    add(
        "--on_error",
        choices=("fail", "skip"),
        default="fail",
        help="what to do with images that cannot be decoded, once all are listed (default: fail)",
    )
    add("--num_workers", type=int, help="processes (default: cores)")
    add("--overwrite", action="store_true", help="replace what the data folder holds")
    return flags


def run(arguments: argparse.Namespace) -> None:
    from lbsgd.convert.convert import convert, look
    from lbsgd.convert.verify import verify

    data_dir, num_workers = data_folder(arguments.data_dir), arguments.num_workers
    if arguments.verify:
        if given := [
            name
            for name in vars(arguments)
            if name not in VERIFYING and getattr(arguments, name) != parser().get_default(name)
        ]:
            raise ConfigError(
                f"--verify does not go with --{given[0]}: it takes the settings from the folder's manifest.json, "
                f"and changes nothing"
            )
        return verify(data_dir, num_workers, arguments.source and Path(arguments.source))
    source = Path(arguments.source or os.environ.get("IMAGENET_DIR") or "data/imagenet")
    sizes = {name: getattr(arguments, name) for name in SIZES}
    if sizes["max_side"] is None and sizes["short_side"] is None:
        sizes["max_side"] = 500
    if arguments.dry_run:
        return print(look(source, data_dir, num_workers, **sizes))
    return convert(
        source, data_dir, num_workers=num_workers, on_error=arguments.on_error, overwrite=arguments.overwrite, **sizes
    )


def main() -> int:
    try:
        run(parser().parse_args())
    except LbsgdError as error:
        print_error(error)
        return error.exit_code
    except ImportError as error:
        print(
            f"error: the converter needs OpenCV and Pillow ({error}); run `make setup`, or `pip install 'lbsgd[ffcv]'`",
            file=sys.stderr,
        )
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
