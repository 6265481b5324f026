"""python tools/convert_imagenet_to_ffcv.py [--source DIR] [--data_dir DIR] [--overwrite]
                                           [--max_side 500] [--quality 90] [--num_workers N]

Makes train.beton, val.beton and manifest.json in --data_dir ($IMAGENET_FFCV_DIR, else data/imagenet_ffcv) from the
folders train/<class>/* and val/<class>/* in --source ($IMAGENET_DIR, else data/imagenet).
"""

import argparse
import os
import sys
from pathlib import Path

from lbsgd.beton import data_folder
from lbsgd.convert import convert
from lbsgd.errors import DataError


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--source", metavar="DIR", help="holds train/<class>/* and val/<class>/*")
    flags.add_argument("--data_dir", metavar="DIR", help="where the FFCV files go")
    flags.add_argument("--max_side", type=int, default=500, metavar="PIXELS", help="larger images are shrunk to this")
    flags.add_argument("--quality", type=int, default=90, help="JPEG quality, 1 to 100 (default: 90)")
    flags.add_argument("--num_workers", type=int, default=os.cpu_count(), help="processes (default: cores)")
    flags.add_argument("--overwrite", action="store_true", help="replace what the data folder holds")
    arguments = flags.parse_args()
    if not (1 <= arguments.quality <= 100 and arguments.max_side >= 1 and arguments.num_workers >= 1):
        flags.error("--quality must be 1 to 100, --max_side and --num_workers at least 1")
    source = Path(arguments.source or os.environ.get("IMAGENET_DIR") or "data/imagenet")
    try:
        convert(source, data_folder(arguments.data_dir), max_side=arguments.max_side, quality=arguments.quality,
                num_workers=arguments.num_workers, overwrite=arguments.overwrite)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
