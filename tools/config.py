"""python tools/config.py --global_batch 12288 --gpus 96 --precision fp16

Write a complete, checked DeepSpeed JSON; `--all ds_configs` writes the paper's whole grid. The same as `lbsgd config`.
"""

import sys

from lbsgd.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["config", *sys.argv[1:]]))
