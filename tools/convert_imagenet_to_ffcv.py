"""python tools/convert_imagenet_to_ffcv.py [--source PATH] [--data_dir DIR] [--dry_run] [--verify]

Turns your copy of ImageNet into train.beton, val.beton and manifest.json, which training reads. The same as
`lbsgd convert`.
"""

import sys

from lbsgd.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
